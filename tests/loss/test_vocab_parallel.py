"""The fused head with sharded models gives the numbers of one process, in float64, that holds the whole model.

The processes are real (gloo); each case runs one step as the trainer does and writes its measurements to a file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

from sft.data.loading.collator import Collator
from sft.distributed.dtensor import VocabularyShard, to_full
from sft.loss.chunked import score_in_blocks
from sft.loss.forward import TokenForward
from sft.loss.output_head import LogitTransform
from sft.loss.token_loss import LossSettings, Objective, TokenLoss
from sft.loss.vocab_parallel import choose_chunk_size, vocab_parallel_scores
from sft.model.attention import document_attention
from sft.model.attention.document_attention import takes_documents
from sft.training.optim.grad_norm import clip_gradients, gradient_norms, total_norm
from tests.loss.test_fused_linear import HEADS, SIZES, VOCAB, assert_same_gradients, base_of
from tests.loss.test_token_loss import OBJECTIVES, by_hand
from tests.ranks import spawn_ranks

pytestmark = pytest.mark.slow

EVERYTHING = Objective(label_smoothing=0.1, z_loss=1e-2, entropy=True)
CHUNK = 4  # tokens; each rank trains on more than five times as many
LENGTHS = ((17, 9, 14), (12, 21, 8))  # of the rows of one rank's batch, and of another's
DATA, TENSOR = 2, 2  # ranks of each kind


@dataclass(frozen=True)
class Case:
    """One step of one model.

    Attributes:
        kind: of head, in `HEADS`.
        way: how it is sharded.
        objective: of training.
        documents: attention over documents in one flattened sequence, instead of padded sequences.
        checkpointed: layers are recomputed in the backward pass.
        accumulated: two micro-batches, whose gradients are reduced together after the second.
    """

    kind: str
    way: str = "root"
    objective: Objective = EVERYTHING
    documents: bool = False
    checkpointed: bool = False
    accumulated: bool = False

    def __str__(self) -> str:
        flags = [name for name in ("documents", "checkpointed", "accumulated") if getattr(self, name)]
        loss_type = ["dft"] if self.objective.loss_type == "dft" else []
        return ", ".join([self.kind, self.way, *loss_type, *flags])


HERE = ("untied", "tied", "frozen", "bias", "softcap", "multiplied", "divided")
ADAPTED = ("lora elsewhere", "lora on the head", "dora on the head", "head trained whole")
DFT = replace(EVERYTHING, loss_type="dft")

FULLY_SHARDED = [
    *(Case(kind) for kind in (*HERE, *ADAPTED)),
    *(Case(kind, way) for kind in ("untied", "lora on the head", "head trained whole") for way in ("own", "tail")),
    Case("bias", "own"),
    Case("tied", "tied group"),
    Case("untied", documents=True, checkpointed=True),
    Case("lora on the head", "own", documents=True, checkpointed=True, accumulated=True),
    Case("untied", "own", accumulated=True),
]
TENSOR_PARALLEL = [
    *(Case(kind, "slices") for kind in (*HERE, "lora elsewhere", "lora on the head", "head trained whole")),
    *(Case(kind, way) for kind in ("untied", "softcap", "lora on the head") for way in ("gathered", "DTensor")),
    Case("softcap", "slices", DFT),
    Case("untied", "slices", documents=True, checkpointed=True),
]
BOTH = [
    Case("untied", "root"),
    Case("untied", "own", documents=True, checkpointed=True),
    Case("tied", "root"),
    Case("lora on the head", "own"),
]


# On one process


def rows_of(rank: int) -> list[dict[str, Any]]:
    """Rows of unequal length, of which some tokens are trained."""
    generator = torch.Generator().manual_seed(rank)
    rows = []
    for length in LENGTHS[rank]:
        ids = torch.randint(0, VOCAB, (length,), generator=generator)
        labels = ids.where(torch.rand(length, generator=generator) < 0.7, -100)
        labels[0] = -100
        rows.append({"input_ids": ids.numpy(), "labels": labels.numpy()})
    return rows


def exact(case: Case, rows: list[dict[str, Any]]) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """The sums over the rows, and the gradients of their objective over their tokens, row by row in float64."""
    model = HEADS[case.kind]().double()
    sums = dict.fromkeys(("objective", "nll", "tokens", "correct", "entropy"), 0.0)
    total = torch.zeros((), dtype=torch.float64)
    o = case.objective
    for row in rows:
        ids, labels = (torch.from_numpy(row[name])[None] for name in ("input_ids", "labels"))
        logits = model(input_ids=ids, use_cache=False).logits
        sums = {name: sums[name] + value for name, value in by_hand(logits, labels, o).items()}
        x, y = logits[0, :-1][labels[0, 1:] != -100], labels[0, 1:][labels[0, 1:] != -100]
        log_p = x.log_softmax(-1)
        nll = -log_p.gather(1, y[:, None]).squeeze(1)
        smoothed = (1 - o.label_smoothing) * nll - o.label_smoothing * log_p.mean(-1)
        weight = torch.exp(-nll).detach() if o.loss_type == "dft" else 1.0
        total = total + (weight * smoothed + o.z_loss * x.logsumexp(-1).square()).sum()
    (total / sums["tokens"]).backward()
    return sums, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# On the ranks


def fully_sharded(model: Any, way: str, mesh: DeviceMesh, **settings: Any) -> None:
    """Each layer is a group, and all else another, with the head or without it."""
    base = base_of(model)
    decoder = base.get_decoder()
    shard = partial(fully_shard, mesh=mesh, **settings)
    for layer in decoder.layers:
        shard(layer)
    if way == "own":
        shard(base.lm_head)
    elif way == "tail":
        shard([decoder.norm, base.lm_head], reshard_after_forward=False)
    elif way == "tied group":
        shard([decoder.embed_tokens, base.lm_head])
    shard(model)


COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc1")
ROWS = ("o_proj", "down_proj", "dense", "fc2")
OF_THE_HEAD: dict[str, Callable[[], ColwiseParallel]] = {
    "slices": ColwiseParallel,
    "gathered": lambda: ColwiseParallel(output_layouts=Replicate()),
    "DTensor": lambda: ColwiseParallel(use_local_output=False),
}


def tensor_parallel(model: Any, way: str, mesh: DeviceMesh) -> None:
    """Heads and the inner width of each layer are split over the ranks, as is the vocabulary."""
    base = base_of(model)
    embeddings = base.get_input_embeddings()
    is_tied = getattr(base.lm_head, "weight", None) is embeddings.weight
    plan: dict[str, Any] = {}
    for name, module in base.named_modules():
        parts = set(name.split("."))
        if module is embeddings and is_tied:
            plan[name] = RowwiseParallel(input_layouts=Replicate())
        if not isinstance(module, nn.Linear) or "original_module" in parts:
            continue
        if "lora_A" in parts:
            plan[name] = OF_THE_HEAD["gathered"]()
        elif "lm_head" in parts:
            plan[name] = OF_THE_HEAD[way]()
        elif parts.intersection(COLUMNS):
            plan[name] = ColwiseParallel()
        elif parts.intersection(ROWS):
            plan[name] = RowwiseParallel()
    parallelize_module(base, mesh, plan)
    if is_tied:
        base.lm_head.weight = embeddings.weight


class LargestLogits(TorchDispatchMode):
    """Finds the most elements of any new matrix that is as wide as the vocabulary or a rank's slice of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.widths, self.largest = (width, width - 1, VOCAB), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_new = not any(returned.alias_info for returned in func._schema.returns)  # neither a view nor in place
        for tensor in result if isinstance(result, tuple | list) else [result]:
            is_matrix = is_new and isinstance(tensor, torch.Tensor) and tensor.ndim > 1
            # As many rows as the model is wide are a weight on its side.
            if is_matrix and tensor.shape[-1] in self.widths and tensor.shape[0] != SIZES["hidden_size"]:
                self.largest = max(self.largest, tensor.numel())
        return result


def measured(case: Case, shard: Callable[[Any], None], rows: list[dict[str, Any]], ranks: int) -> dict[str, Any]:
    """Runs a step on one rank's rows: their sums, and the full gradients that the ranks have afterwards."""
    model = HEADS[case.kind]()
    base = base_of(model)
    if case.documents:
        document_attention.register()
        base.set_attn_implementation("sft_documents")
    if case.checkpointed:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    shard(model)
    forward = TokenForward(model.train(), LossSettings(case.objective, CHUNK))
    collate = Collator(0, flatten=takes_documents(base.config))
    micro_batches = [rows[:1], rows[1:]] if case.accumulated else [rows]
    count = torch.tensor(sum((row["labels"] != -100).sum() for r in range(ranks) for row in rows_of(r)))
    sums = []
    with LargestLogits(-(-VOCAB // 2)) as watch:
        for number, some in enumerate(micro_batches):
            if case.accumulated:
                model.set_requires_gradient_sync(number == len(micro_batches) - 1)
            result = forward(model, collate(some), ranks / count)
            (result.objective * (ranks / count)).backward()
            sums.append(result)
    spread = [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
    gradients = {name: to_full(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}
    norm = total_norm(gradient_norms(model.named_parameters()).values())
    clip_gradients(model.parameters(), float(norm) / 4, norm)
    norms = [float(norm), float(total_norm(gradient_norms(model.named_parameters()).values()))]
    model.eval()
    with torch.no_grad():
        evaluated = forward(model, collate(rows))
    return {
        "sums": _added(sums),
        "evaluated": _added([evaluated]),
        "gradients": gradients,
        "norms": norms,
        "spread": spread,
        "largest": watch.largest,
        "reason": forward.unfused_reason,
    }


def _added(results: list[TokenLoss]) -> dict[str, float]:
    return {name: sum(r.as_dict()[name].item() for r in results) for name in results[0].as_dict()}


def _on_two_ranks(rank: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    found: dict[str, Any] = {}
    for case in FULLY_SHARDED:
        found[f"fsdp {case}"] = measured(case, partial(fully_sharded, way=case.way, mesh=mesh), rows_of(rank), 2)
    for case in TENSOR_PARALLEL:
        found[f"tp {case}"] = measured(case, partial(tensor_parallel, way=case.way, mesh=mesh), rows_of(0), 1)
    torch.save(found, f"{folder}/{rank}.pt")
    torch.save(_slices(rank, mesh.get_group()), f"{folder}/slices{rank}.pt")
    torch.save(_in_bfloat16(rank, mesh), f"{folder}/bfloat16{rank}.pt")


def _on_four_ranks(rank: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (DATA, TENSOR), mesh_dim_names=("data", "tensor"))

    def shard(model: Any, way: str) -> None:
        tensor_parallel(model, "slices", mesh["tensor"])
        fully_sharded(model, way, mesh["data"])

    found = {}
    for case in BOTH:
        found[str(case)] = measured(case, partial(shard, way=case.way), rows_of(rank // TENSOR), DATA)
    torch.save(found, f"{folder}/{rank}.pt")


def _loaded(folder: Path, ranks: int, name: str = "") -> list[Any]:
    return [torch.load(folder / f"{name}{rank}.pt", weights_only=False) for rank in range(ranks)]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    spawn_ranks(_on_two_ranks, folder, 2)
    return folder


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("four")
    spawn_ranks(_on_four_ranks, folder, DATA * TENSOR)
    return folder


# The same numbers


def assert_exact(case: Case, ranks: list[dict[str, Any]], rows: list[list[dict[str, Any]]]) -> None:
    """Each rank must have the sums over its own rows, and all ranks the gradients over all rows."""
    for found, own in zip(ranks, rows, strict=True):
        assert found["reason"] is None
        expected, _ = exact(case, own)
        for name, value in expected.items():
            assert found["sums"][name] == pytest.approx(value, rel=1e-6), name
        plain, _ = exact(replace(case, objective=Objective(entropy=True)), own)
        for name, value in plain.items():
            assert found["evaluated"][name] == pytest.approx(value, rel=1e-6), name
        assert 0 < found["largest"] <= CHUNK * (VOCAB + 1)  # slices that are gathered are padded to one width
        tokens = sum(int((row["labels"] != -100).sum()) for row in own)
        assert found["largest"] < tokens * VOCAB / 4
    unique = list({id(own): own for own in rows}.values())
    _, gradients = exact(case, [row for own in unique for row in own])
    for found in ranks:
        assert_same_gradients(found["gradients"], gradients, 1e-5)
        norm = sum(float(gradient.square().sum()) for gradient in gradients.values()) ** 0.5
        assert found["norms"] == pytest.approx([norm, norm / 4], rel=1e-4), "over all meshes, and after clipping"


@pytest.mark.parametrize("case", FULLY_SHARDED, ids=str)
def test_fully_sharded(case: Case, two_ranks: Path) -> None:
    ranks = [found[f"fsdp {case}"] for found in _loaded(two_ranks, 2)]
    names = [name for name, _ in HEADS[case.kind]().named_parameters()]
    assert ranks[0]["spread"] == names, "not a parameter is whole"
    assert_exact(case, ranks, [rows_of(0), rows_of(1)])


@pytest.mark.parametrize("case", TENSOR_PARALLEL, ids=str)
def test_tensor_parallel(case: Case, two_ranks: Path) -> None:
    ranks = [found[f"tp {case}"] for found in _loaded(two_ranks, 2)]
    assert any("lm_head" in name or "embed_tokens" in name for name in ranks[0]["spread"])
    rows = rows_of(0)
    assert_exact(case, ranks, [rows, rows])


@pytest.mark.parametrize("case", BOTH, ids=str)
def test_tensor_parallel_within_fully_sharded(case: Case, four_ranks: Path) -> None:
    rows = [rows_of(0), rows_of(1)]
    ranks = _loaded(four_ranks, DATA * TENSOR)
    assert_exact(case, [found[str(case)] for found in ranks], [rows[rank // TENSOR] for rank in range(len(ranks))])


def test_a_rank_holds_only_its_slice_of_the_logits(two_ranks: Path) -> None:
    largest = [found["tp untied, slices"]["largest"] for found in _loaded(two_ranks, 2)]
    assert largest == [CHUNK * 51, CHUNK * 50]


# Slices of a vocabulary

TRANSFORMS = (LogitTransform(), LogitTransform(0.5), LogitTransform(cap=4.0))


def _logits(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of which many are the largest of their row, and targets that are first among them or not."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-6, 7, (300, VOCAB), generator=generator).to(dtype)
    first = logits.float().argmax(-1)
    targets = torch.randint(0, VOCAB, (300,), generator=generator)
    targets[:100] = first[:100]
    targets[100:200] = (VOCAB - 1) - logits[100:200].float().flip(1).argmax(-1)  # the last among the largest
    return logits, targets


def _each() -> list[tuple[Objective, LogitTransform, torch.dtype]]:
    dtypes = (torch.float32, torch.bfloat16)
    return [(objective, transform, dtype) for objective in OBJECTIVES for transform in TRANSFORMS for dtype in dtypes]


def _slices(rank: int, group: Any) -> list[Any]:
    widest = -(-VOCAB // 2)
    start = rank * widest
    width = min(widest, VOCAB - start)
    shard = VocabularyShard(VOCAB, start, width, widest, group)
    found = []
    for objective, transform, dtype in _each():
        logits, targets = _logits(dtype)
        own = logits[:, start : start + width].clone()
        scores = vocab_parallel_scores(own, targets, objective, transform, True, torch.tensor(0.25), shard=shard)
        found.append((scores[0], own))
    return found


def test_slices_score_like_one_vocabulary(two_ranks: Path) -> None:
    """Also where several logits are the largest, on any rank; within the rounding of the logits' dtype."""
    ranks = _loaded(two_ranks, 2, "slices")
    for number, (objective, transform, dtype) in enumerate(_each()):
        logits, targets = _logits(dtype)
        parts = score_in_blocks(logits, targets, objective, transform, True, torch.tensor(0.25))
        expected = {name: torch.cat([getattr(p, name) for p in parts]) for name in ("loss", "nll", "correct")}
        assert 0.3 < expected["correct"].float().mean() < 0.7
        for scores, _ in (found[number] for found in ranks):
            assert scores.correct.equal(expected["correct"])
            torch.testing.assert_close(scores.nll, expected["nll"], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(scores.loss, expected["loss"], rtol=1e-5, atol=1e-5)
            if objective.entropy:
                entropy = torch.cat([part.entropy for part in parts if part.entropy is not None])
                torch.testing.assert_close(scores.entropy, entropy, rtol=1e-5, atol=1e-5)
        gradient = torch.cat([found[number][1] for found in ranks], 1)
        relative, absolute = (1e-5, 1e-6) if dtype == torch.float32 else (1e-2, 1e-4)
        torch.testing.assert_close(gradient, logits, rtol=relative, atol=absolute)


def test_ranks_agree_on_the_size_of_a_chunk() -> None:
    """It depends on nothing that differs between them, such as the slice or the free memory."""
    group: Any = None
    shards = [
        VocabularyShard(151_936, start, width, 50_646, group) for start, width in ((0, 50_646), (101_292, 50_644))
    ]
    sizes = {choose_chunk_size(shard, torch.device("cpu")) for shard in shards}
    assert sizes == {2**24 // 50_646}
    assert choose_chunk_size(replace(shards[0], widest=2**40), torch.device("cpu")) == 1


# Mixed precision


def _in_bfloat16(rank: int, mesh: DeviceMesh) -> Any:
    """Float32 weights that are gathered in bfloat16 and whose gradients are reduced in float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    case = Case("untied", "own", documents=True)
    return measured(case, partial(fully_sharded, way="own", mesh=mesh, mp_policy=policy), rows_of(rank), 2)


def test_weights_may_be_gathered_in_bfloat16(two_ranks: Path) -> None:
    case = Case("untied", "own", documents=True)
    expected, gradients = exact(case, rows_of(0) + rows_of(1))
    ranks = _loaded(two_ranks, 2, "bfloat16")
    assert sum(found["sums"]["nll"] for found in ranks) == pytest.approx(expected["nll"], rel=2e-2)
    for found in ranks:
        assert found["reason"] is None
        assert {gradient.dtype for gradient in found["gradients"].values()} == {torch.float32}
        assert_same_gradients(found["gradients"], gradients, 0.1)
