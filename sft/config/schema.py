"""Every config key: its type, default, meaning and unit. No default is defined anywhere else.

`Config` is one flat model made of groups. A stage receives the group it uses: `config.section(DataKeys)`.
Keys of `TrainingArguments`, `LoraConfig` and `BitsAndBytesConfig` come from `sft.config.upstream_schema`; those
declared here replace upstream's.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import Field

from sft.config.field_types import Bool, Int, Number, PathText
from sft.config.section import ConfigSection
from sft.config.upstream_schema import make_upstream, non_default_values, upstream_defaults, upstream_keys

if TYPE_CHECKING:

    class _Upstream(ConfigSection):
        def __getattr__(self, name: str) -> Any: ...

    TrainingArgumentsKeys = _Upstream
    LoraConfigKeys = _Upstream
    BitsAndBytesConfigKeys = _Upstream
else:
    TrainingArgumentsKeys = upstream_keys("TrainingArguments")
    LoraConfigKeys = upstream_keys("LoraConfig")
    BitsAndBytesConfigKeys = upstream_keys("BitsAndBytesConfig")

Group = TypeVar("Group", bound=ConfigSection)
Share = Annotated[Number, Field(ge=0, lt=1)]
Count = Annotated[Int, Field(ge=0)]
Positive = Annotated[Int, Field(ge=1)]
Seed = Annotated[Int, Field(ge=0, le=2**32 - 1)]  # what numpy takes
Format = Literal["auto", "alpaca", "chat", "qa", "text"]
TrainOn = Literal["assistant", "last_assistant", "all"]
Packing = Literal["auto", "bfd", "wrapped", False]


class ModelKeys(ConfigSection):
    """Which model and tokenizer, and how the weights are held."""

    model_name_or_path: PathText | None = None
    """The model to fine-tune: a folder in Hugging Face layout, or a name on the hub."""
    tokenizer_name_or_path: PathText | None = None
    """The tokenizer, where it is not the model's own: a folder or a name on the hub."""
    model_revision: str | None = None
    """Branch, tag or commit of a hub model; null is its main branch."""
    trust_remote_code: Bool = False
    """Whether Python code that comes with a hub model may run on this machine."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The dtype of the weights; `auto` chooses for the machine and logs its choice."""
    attn_implementation: str = "auto"
    """The attention kernel, e.g. `sdpa`, `eager`, `flash_attention_2`; `auto` chooses for the machine."""
    from_scratch: dict[str, Any] | PathText | None = None
    """Start from random weights: a model config with `model_type`, or the path of a JSON or YAML file with one."""
    chat_template: PathText | None = None
    """Chat template to use instead of the tokenizer's: a file, Jinja text, or the name `plain` or `chatml`."""
    special_tokens: list[str] | dict[str, str | list[str]] | None = None
    """Tokens to add: a list of texts, or a mapping of roles such as `pad_token` to texts."""


class DatasetKeys(ConfigSection):
    """One data set among several."""

    path: PathText
    """A file, folder, glob, saved data set, or name on the hub."""
    name: str | None = None
    """What reports and metrics call this data set; null takes it from the path."""
    split: str | None = None
    """The split of a hub data set or saved data set dictionary, e.g. `train`."""
    format: Format | None = None
    """The row format; null takes the config's `format`."""
    columns: dict[str, str] | None = None
    """The names of this data set's columns by the names of the format; null takes the config's `columns`."""
    weight: Annotated[Number, Field(gt=0)] | None = None
    """This data set's share of an epoch in proportion to the others' (see `mix_by`); null takes each row once."""
    max_samples: Positive | None = None
    """Rows to use at the most, counted from the first; null uses all."""
    train_on: TrainOn | None = None
    """Which turns are trained; null takes the config's `train_on`."""

    def display_name(self, default: str) -> str:
        """Returns the name for reports and metrics: `default` where neither `name` nor the path gives one."""
        return self.name or Path(self.path).stem or default


class DataKeys(ConfigSection):
    """Which rows, and how they become tokens and labels."""

    dataset_name: str | None = None
    """A data set on the hub."""
    dataset_config_name: str | None = None
    """The configuration of `dataset_name`, e.g. `main`."""
    dataset_path: PathText | None = None
    """A folder: saved by `datasets` (`save_to_disk`), or with files named for their splits (train*, validation*)."""
    train_file: PathText | list[PathText] | None = None
    """Training rows: a file, glob or folder, or a list of them (json, jsonl, csv, tsv, txt, parquet, arrow)."""
    validation_file: PathText | list[PathText] | None = None
    """Validation rows, in the same ways as `train_file`."""
    validation_split: Share = 0.0
    """Share of the training rows to hold out for validation, drawn with `shuffle_seed`."""
    datasets: list[DatasetKeys] | None = None
    """Several training data sets, each with its own settings."""
    eval_datasets: list[DatasetKeys] | None = None
    """Several validation data sets, each reported under its own name."""
    mix_by: Literal["rows", "tokens"] = "rows"
    """What the weights of `datasets` are shares of; an epoch has as many as all data sets together."""
    format: Format = "auto"
    """The row format; `auto` detects it for each row."""
    columns: dict[str, str] | None = None
    """The names of your columns by the names of the format, e.g. `{question: problem, answer: solution}`."""
    system_prompt: str | None = None
    """System message for every conversation that has none."""
    train_on: TrainOn = "assistant"
    """Which turns are trained: every answer, only the last answer, or all tokens."""
    max_seq_length: Annotated[Int, Field(ge=2)] = 2048
    """Length limit of a training sequence, in tokens."""
    truncation: Literal["error", "drop", "left", "right", "split"] = "drop"
    """What to do with a row longer than `max_seq_length`: stop, skip it, cut off one side, or split it."""
    packing: Packing = "auto"
    """Several rows in one training sequence: best-fit decreasing (`bfd`), a token stream cut at the limit (`wrapped`),
    or none. `auto` is `bfd` where the model keeps samples apart, two or more fit in a sequence, and an epoch keeps 50
    steps."""
    eval_packing: Packing | None = None
    """The same for validation; null is as `packing`."""
    special_tokens_in_content: Literal["text", "allow", "error"] = "text"
    """Control tokens typed inside a message, e.g. `<|im_end|>`: plain text, control tokens (`allow`), or an error."""
    streaming: Bool = False
    """Read the training rows while training, for data larger than memory or disk; `max_steps` says when to stop."""
    streaming_window: Positive = 10_000
    """Rows that each process (or dataloader worker) of a streaming run packs and shuffles together."""
    shuffle_seed: Seed | None = None
    """Seed of the validation split, the mixture and the row order (also `data_seed`); null is `seed`."""
    preprocessing_num_workers: Positive | None = None
    """Threads that tokenize; null uses all cores."""
    dedupe: Bool = False
    """Skip training rows whose text occurred before."""
    max_lost_fraction: Annotated[Number, Field(ge=0, le=1)] = 0.05
    """Share of the rows that may be lost to mistakes in the data; above it the run stops before training."""
    cache_dir: PathText | None = None
    """Folder for prepared data; null is $SFT_CACHE, or sft_pipeline in the user's cache folder."""


class ActivationKeys(ConfigSection):
    """What the forward pass keeps for the backward pass."""

    mode: Literal["none", "selective", "full"] = "full"
    """Keep all; recompute norms and gates and keep the results of matrix multiplications; or keep layer inputs only."""
    offload: Bool = False
    """Move what is kept to main memory until the backward pass (GPU, `selective` or `full`)."""


class TrainingKeys(TrainingArgumentsKeys):
    """Every key of `transformers.TrainingArguments`, and ours beside them."""

    output_dir: PathText = "outputs"
    """Folder for checkpoints, the final model, logs and reports."""
    per_device_train_batch_size: Positive | Literal["auto"] = 8
    """Sequences in one micro-batch on one device; `auto` tries sizes on the longest and takes the fastest that fits."""
    auto_batch_memory_fraction: Annotated[Number, Field(gt=0, le=1)] = 0.85
    """Share of the device's memory that `per_device_train_batch_size: auto` may use."""
    logging_steps: Annotated[Number, Field(gt=0)] = 10
    """Optimizer steps between two log lines; below 1 a share of all steps."""
    report_to: str | list[str] = "none"
    """Trackers that get the metrics, e.g. `wandb`, `tensorboard`; `none` for none, `all` for the installed."""
    fsdp: Bool | str | list[str] | None = None
    """Refused for now: shard the model with torch's FSDP: true, or text, which is upstream's older way."""
    remove_unused_columns: Literal[False] = False
    """Stays false: the data handler makes exactly the columns that the trainer uses."""
    logging_nan_inf_filter: Literal[False] = False
    """Stays false: upstream's filter would show the running mean in place of a loss that is not finite."""
    resume_from_checkpoint: PathText | Bool | None = None
    """A checkpoint folder to resume from; `auto` (or true) takes the newest complete one in `output_dir`."""
    warmup_ratio: Share | None = None
    """Share of the optimizer steps in which the learning rate rises; excludes `warmup_steps`."""
    activation_checkpoint: ActivationKeys | None = None
    """What is kept for the backward pass; excludes `activation_checkpointing`, which decides where this is null."""
    global_batch_size: Positive | None = None
    """Sequences per optimizer step over all processes; sets `gradient_accumulation_steps`, and excludes it."""

    def training_arguments(self) -> dict[str, Any]:
        """Returns the keyword arguments for `transformers.TrainingArguments`.

        They are the values that differ from upstream's defaults and those that the user gave: a caller that adds
        missing arguments must not override a user who asked for the default.
        """
        arguments = {
            name: value
            for name, value in self
            if name in _TRAINING_DEFAULTS
            and name not in SECRET_KEYS  # each checkpoint holds these arguments, pickled
            and (self.is_set(name) or value != _TRAINING_DEFAULTS[name])
        }
        if arguments.get("per_device_train_batch_size") == "auto":
            del arguments["per_device_train_batch_size"]  # chosen later, in the batch plan
        if self.warmup_ratio is not None:
            arguments["warmup_steps"] = self.warmup_ratio
        for name in ("checkpointing", "checkpointing_kwargs"):  # renamed: the old names do the same, and warn each run
            if (value := arguments.pop(f"gradient_{name}", None)) is not None:
                arguments[f"activation_{name}"] = value
        if not isinstance(arguments.get("resume_from_checkpoint"), str):
            arguments.pop("resume_from_checkpoint", None)  # upstream's field accepts a path only
        if self.parallelism_config is not None:
            arguments["parallelism_config"] = make_upstream(self.parallelism_config)
        return arguments


class LossKeys(ConfigSection):
    """What is minimised, besides `label_smoothing_factor` of the Trainer's own keys."""

    loss_type: Literal["nll", "dft"] = "nll"
    """Cross entropy, or that weighted by each token's own probability (dynamic fine-tuning, arXiv:2508.05629)."""
    loss_chunk_size: Positive | None = None
    """Supervised tokens whose logits are in memory at a time; null chooses for the machine."""
    z_loss_coef: Annotated[Number, Field(ge=0)] = 0.0
    """Weight of the squared log of the softmax's denominator, which keeps logits small (arXiv:2204.02311)."""
    router_aux_loss_coef: Annotated[Number, Field(ge=0)] | None = None
    """Weight of the loss that balances a mixture of experts (arXiv:2101.03961); null takes the model's own, if its
    config has `output_router_logits`."""
    log_entropy: Bool = False
    """Also log the entropy of the predicted distribution, in nats per token."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do at a loss or gradient that is not finite: end the run (exit code 3), or skip the step."""
    nonfinite_limit: Positive = 10
    """How many steps `on_nonfinite: skip` may skip; at the next one the run ends."""


class LoraKeys(LoraConfigKeys):
    """Every key of `peft.LoraConfig`: small trainable matrices beside the frozen weights (arXiv:2106.09685)."""

    r: Positive = 16
    """Rank of the update: the width of the two matrices beside each adapted layer."""
    lora_alpha: Positive = 32
    """Scale of the update: it is multiplied by lora_alpha / r (by lora_alpha / sqrt(r) with `use_rslora`)."""
    lora_dropout: Share = 0.0
    """Share of the adapter's inputs that is zeroed in training."""
    target_modules: list[str] | str | None = "all-linear"
    """Layers to adapt: names or name ends, one regular expression, or `all-linear` (all but the output layer)."""
    task_type: Literal["CAUSAL_LM"] = "CAUSAL_LM"
    """Stays CAUSAL_LM, the task that this pipeline trains."""
    peft_type: Literal["LORA"] | None = None
    """Stays LORA: peft sets it."""
    inference_mode: Literal[False] = False
    """Stays false: true would freeze the adapter and train nothing."""

    def kwargs(self) -> dict[str, Any]:
        """Returns the keyword arguments for `peft.LoraConfig`: the values that differ from peft's defaults.

        Nested sections become peft's own classes, which imports peft.
        """
        return non_default_values("LoraConfig", self)


class QuantizationKeys(BitsAndBytesConfigKeys):
    """Every key of `transformers.BitsAndBytesConfig`: frozen weights in 4 or 8 bits (QLoRA, arXiv:2305.14314)."""

    load_in_4bit: Bool = False
    """Hold the weights of linear layers in 4 bits."""
    load_in_8bit: Bool = False
    """Hold the weights of linear layers in 8 bits."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 4-bit data type; the values of `nf4` are spaced for normally distributed weights."""
    bnb_4bit_use_double_quant: Bool = True
    """Quantize the scales of the 4-bit blocks as well: saves about 0.4 bit per weight."""
    bnb_4bit_compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of matrix multiplications with 4-bit weights; null chooses for the machine."""

    def kwargs(self) -> dict[str, Any]:
        """Returns the keyword arguments for `transformers.BitsAndBytesConfig` that differ from its defaults."""
        return non_default_values("BitsAndBytesConfig", self)


class AdapterKeys(ConfigSection):
    """What is trained instead of all the weights, and what the frozen ones are held in."""

    lora_config: LoraKeys | None = None
    """Train a LoRA adapter; `{}` takes every default, null trains all weights."""
    quantization_config: QuantizationKeys | None = None
    """Hold the frozen weights quantized; to train, it needs `lora_config`."""


class DistributionKeys(ConfigSection):
    """How many devices."""

    num_gpus: Count | None = None
    """GPUs to use on this machine; null uses all, 0 the CPU."""


class WatchKeys(ConfigSection):
    """What a run shows of itself."""

    wandb_project: str | None = None
    """Weights & Biases project; null leaves it to WANDB_PROJECT or the tracker's default."""
    logging_dir: PathText | None = None
    """Folder of the TensorBoard files; null is a folder in `output_dir`."""
    exact_match_samples: Count = 0
    """Validation rows answered greedily before and after training and compared with the right answer."""


class Config(ModelKeys, DataKeys, TrainingKeys, LossKeys, AdapterKeys, DistributionKeys, WatchKeys):
    """The whole config of a run."""

    @property
    def order_seed(self) -> int:
        """The seed of the order of training rows, loaded or streamed."""
        return next(seed for seed in (self.shuffle_seed, self.data_seed, self.seed) if seed is not None)

    def section(self, group: type[Group]) -> Group:
        """Returns the keys of one group, as a stage receives them."""
        values = {name: getattr(self, name) for name in group.model_fields}
        part = group.model_construct(_fields_set=self.model_fields_set & values.keys(), **values)
        part._places, part._section = self._places, self._section
        return part


GROUPS: tuple[type[ConfigSection], ...] = Config.__bases__
"""The groups of `Config`, in the order in which `write_config` writes them."""

SECRET_KEYS = frozenset({"hub_token"})
"""Keys whose values are never written, printed or logged."""

_TRAINING_DEFAULTS = upstream_defaults("TrainingArguments")
