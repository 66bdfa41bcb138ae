"""Our descriptions and limits of upstream's keys, and the keys that no run here supports.

Keys that `sft.config.schema` redefines are described there. A test compares the tables with upstream's keys.
"""

from __future__ import annotations

_TRAINING = {
    "num_train_epochs": "Passes over the training data; a fraction stops within a pass. `max_steps` overrides it.",
    "max_steps": "Optimizer steps to train for; -1 trains for `num_train_epochs`.",
    "learning_rate": "The highest learning rate of the schedule.",
    "lr_scheduler_type": "How the learning rate changes after the warmup.",
    "lr_scheduler_kwargs": "Further settings of the scheduler, e.g. `{min_lr: 1e-6}`: a mapping or JSON text.",
    "warmup_steps": "Optimizer steps in which the learning rate rises from zero; below 1 a share of all steps.",
    "optim": "The optimizer; those that are called schedule_free are refused for now.",
    "optim_args": "Further settings of the optimizer as text, `name=value,name=value`.",
    "weight_decay": "Decoupled weight decay per step, in units of the learning rate; biases and norms have none.",
    "adam_beta1": "Decay of Adam's first moment.",
    "adam_beta2": "Decay of Adam's second moment.",
    "adam_epsilon": "Term that keeps Adam's denominator above zero.",
    "optim_target_modules": "Modules that GaLore and APOLLO project: names, a regular expression, or `all-linear`.",
    "gradient_accumulation_steps": "Micro-batches per optimizer step.",
    "average_tokens_across_devices": "Divide the loss by the supervised tokens of all processes, not of each one.",
    "max_grad_norm": "Norm that gradients are clipped to; 0 clips nothing.",
    "label_smoothing_factor": "Share of the target's probability that is spread over the vocabulary.",
    "bf16": "Train in bfloat16 mixed precision.",
    "fp16": "Train in float16 mixed precision with loss scaling.",
    "bf16_full_eval": "Refused for now: evaluate with all weights in bfloat16.",
    "fp16_full_eval": "Refused for now: evaluate with all weights in float16.",
    "tf32": "Whether float32 matrix multiplications may use TF32; null leaves it to torch.",
    "activation_checkpointing": "Recompute activations in the backward pass: less memory, about a third more work.",
    "activation_checkpointing_kwargs": "Settings of the recomputation, e.g. `{use_reentrant: false}`.",
    "gradient_checkpointing": "The older name of `activation_checkpointing`; both do the same.",
    "gradient_checkpointing_kwargs": "The older name of `activation_checkpointing_kwargs`.",
    "torch_compile": "Compile the model with torch.compile.",
    "torch_compile_backend": "Backend of torch.compile; giving one turns compiling on.",
    "torch_compile_mode": "Mode of torch.compile; giving one turns compiling on.",
    "use_liger_kernel": "Refused for now: use Liger's fused Triton kernels; see `loss_chunk_size`.",
    "liger_kernel_config": "Refused for now: which of Liger's kernels to use, by name.",
    "use_cache": "Keep the key-value cache in training; costs memory and helps nothing in plain fine-tuning.",
    "neftune_noise_alpha": "Scale of the noise on embeddings in training (NEFTune, arXiv:2310.05914); null for none.",
    "torch_empty_cache_steps": "Steps between two releases of the device's cached memory; null for never.",
    "auto_find_batch_size": "Refused for now: halve the batch size after running out of memory and start again.",
    "logging_strategy": "Log at steps, at epochs, or not at all.",
    "logging_first_step": "Log the first step as well.",
    "log_on_each_node": "Log on the first process of every node, not only of the first.",
    "include_num_input_tokens_seen": "Count input tokens: `all`, `non_padding`, or `no`.",
    "log_level": "Verbosity of the libraries on the main process.",
    "log_level_replica": "Verbosity of the libraries on the other processes.",
    "disable_tqdm": "Show no progress bars; null decides by the log level.",
    "run_name": "The run's name in trackers.",
    "project": "The Trackio project.",
    "trackio_space_id": "Hub space that Trackio shows its dashboard in.",
    "trackio_bucket_id": "Hub bucket that Trackio keeps its data in.",
    "trackio_static_space_id": "Hub space for Trackio's frozen dashboard; false for none.",
    "eval_strategy": "Evaluate at steps, at epochs, or not during training.",
    "eval_steps": "Optimizer steps between two evaluations; below 1 a share of all; null is as `logging_steps`.",
    "eval_delay": "Steps or epochs (as `eval_strategy` counts) before the first evaluation.",
    "per_device_eval_batch_size": "Sequences per device and forward pass in evaluation.",
    "prediction_loss_only": "Compute the loss and nothing else in evaluation.",
    "eval_on_start": "Evaluate once before the first step.",
    "eval_do_concat_batches": "Join predictions of all batches to one array.",
    "eval_use_gather_object": "Gather predictions as nested Python objects.",
    "eval_accumulation_steps": "Evaluation batches between two moves of predictions to the CPU.",
    "include_for_metrics": "What a metric function gets besides predictions: `inputs`, `loss`.",
    "batch_eval_metrics": "Call the metric function batch by batch.",
    "save_only_model": "Write checkpoints without optimizer state: smaller, and not to be resumed from.",
    "save_strategy": "Write checkpoints at steps, at epochs, at the best evaluation, or not at all.",
    "save_steps": "Optimizer steps between two checkpoints; below 1 a share of all steps.",
    "save_on_each_node": "Write checkpoints on every node, for nodes that share no disk.",
    "save_total_limit": "Checkpoints to keep, the oldest is deleted first; null keeps all.",
    "enable_jit_checkpoint": "Refused for now: write a checkpoint when SIGTERM announces the end.",
    "push_to_hub": "Refused for now: upload the model to the Hugging Face hub.",
    "hub_token": "Token for the hub, in none of a run's files; the HF_TOKEN variable is a better place for it.",
    "hub_private_repo": "Whether a repository that `push_to_hub` makes is private; null is the account's default.",
    "hub_model_id": "The hub repository that `push_to_hub` uploads to.",
    "hub_strategy": "What `push_to_hub` uploads, and when.",
    "hub_always_push": "Let `push_to_hub` upload even while the last upload is under way.",
    "hub_revision": "The hub branch that `push_to_hub` uploads to.",
    "load_best_model_at_end": "End with the checkpoint that evaluated best, not the last.",
    "metric_for_best_model": "The metric that decides which evaluation is best, e.g. `perplexity`; null is the loss.",
    "greater_is_better": "Whether a higher metric is better; null decides by its name: yes for accuracies only.",
    "ignore_data_skip": "Resume with the first batch of the epoch, not where the run stopped: trains rows twice.",
    "restore_callback_states_from_checkpoint": "Restore the states of callbacks on resume.",
    "full_determinism": "Use only deterministic algorithms: repeatable to the bit, and slower.",
    "seed": "Seed of weights and dropout, and of the validation split and the row order where no other is given.",
    "data_seed": "Seed of the order of training rows alone; null is `shuffle_seed`, or `seed`.",
    "use_cpu": "Train on the CPU though there is a GPU.",
    "accelerator_config": "Settings of accelerate's `Accelerator`: a mapping, or the path of a JSON file.",
    "parallelism_config": "Refused for now: degrees of accelerate's parallelism.",
    "dataloader_drop_last": "Drop the last batch where it is not full.",
    "dataloader_num_workers": "Processes that load batches; 0 loads in the training process.",
    "dataloader_pin_memory": "Page-lock batches, for quicker copies to a GPU.",
    "dataloader_persistent_workers": "Keep loading processes alive between epochs.",
    "dataloader_prefetch_factor": "Batches that each loading process fetches ahead.",
    "dataloader_multiprocessing_context": "How loading processes start; null is Python's default.",
    "dataloader_in_order": "Keep the order of batches over several loading processes.",
    "label_names": "Columns that hold labels; null is `labels`.",
    "train_sampling_strategy": "The order of training rows, e.g. `random`, `sequential`, `group_by_length`.",
    "length_column_name": "Column of row lengths for `group_by_length`.",
    "ddp_find_unused_parameters": "Search for parameters without gradient in each step; null decides by the model.",
    "ddp_bucket_cap_mb": "Size of a gradient bucket of distributed data parallelism, in MiB.",
    "ddp_broadcast_buffers": "Broadcast module buffers in each forward pass; null decides by the model.",
    "ddp_static_graph": "Promise that every step uses the same parameters.",
    "ddp_backend": "Communication library of the processes; null is nccl on GPUs and gloo on CPUs.",
    "ddp_timeout": "Seconds until a collective operation gives up.",
    "fsdp_config": "Refused for now: settings of FSDP, a mapping or the path of a JSON file.",
    "deepspeed": "Refused for now: DeepSpeed's config, a mapping or the path of a JSON file.",
    "debug": "Debugging aids, e.g. `underflow_overflow`.",
    "skip_memory_metrics": "Skip memory metrics, which slow training down.",
    "do_train": "For scripts that read it; this pipeline's commands decide what is done.",
    "do_eval": "For scripts that read it; this pipeline's commands decide what is done.",
    "do_predict": "For scripts that read it; this pipeline's commands decide what is done.",
    "local_rank": "Rank on this node as older launchers pass it; torchrun's variables take its place.",
}

_LORA = {
    "auto_mapping": "Base classes for models that no task type fits; peft fills it.",
    "peft_version": "The peft version that wrote the adapter; peft fills it.",
    "base_model_name_or_path": "The base model as written into the adapter's config.",
    "revision": "The base model's revision as written into the adapter's config.",
    "exclude_modules": "Layers to exclude from `target_modules`: names, or one regular expression.",
    "fan_in_fan_out": "The layers store weights as (in, out), as GPT-2's Conv1D does.",
    "bias": "Which biases are trained; any but `none` changes the base model's output even without the adapter.",
    "use_rslora": "Scale by alpha / sqrt(rank), which keeps high ranks learning (arXiv:2312.03732).",
    "modules_to_save": "Modules that are trained and saved whole beside the adapter, e.g. `[lm_head]`.",
    "init_lora_weights": "How the matrices start: true (no change at first), `gaussian`, `pissa`, `olora`, `eva`, ...",
    "layers_to_transform": "Numbers of the layers to adapt; null adapts all.",
    "layers_pattern": "Name of the list that `layers_to_transform` counts in, e.g. `layers`.",
    "rank_pattern": "Ranks of single layers, by name or regular expression.",
    "alpha_pattern": "Alphas of single layers, by name or regular expression.",
    "megatron_config": "Megatron's transformer config, for Megatron models.",
    "megatron_core": "The Megatron module to use.",
    "trainable_token_indices": "Ids of tokens whose embeddings are trained without the rest of the table.",
    "loftq_config": "Settings of `init_lora_weights: loftq` (arXiv:2310.08659).",
    "eva_config": "Settings of `init_lora_weights: eva` (arXiv:2410.07170).",
    "corda_config": "Settings of `init_lora_weights: corda` (arXiv:2406.05223).",
    "lora_ga_config": "Settings of `init_lora_weights: lora_ga` (arXiv:2407.05000).",
    "use_dora": "Learn magnitude and direction separately (DoRA, arXiv:2402.09353): slower, better at low rank.",
    "velora_config": "Settings of VeLoRA (arXiv:2405.17991): compressed activations.",
    "alora_invocation_tokens": "Token ids from which on the adapter acts (activated LoRA).",
    "use_qalora": "Quantization-aware LoRA (arXiv:2309.14717).",
    "qalora_group_size": "Inputs per group of quantization-aware LoRA.",
    "monteclora_config": "Settings of Monte Carlo LoRA.",
    "layer_replication": "Ranges of layers to stack into a larger model, as pairs of start and end.",
    "runtime_config": "Settings that are not saved with the adapter.",
    "lora_bias": "Give the second matrix a bias.",
    "target_parameters": "Names of bare parameters to adapt, as in fused expert layers.",
    "use_bdlora": "Settings of block-diagonal LoRA.",
    "arrow_config": "Settings of Arrow routing over several adapters.",
    "kasa_config": "Settings of KaSA (arXiv:2412.06071).",
    "ensure_weight_tying": "Keep tied weights tied where one of them is adapted or trained whole.",
}

_QUANTIZATION = {
    "llm_int8_threshold": "Activations above it are multiplied in 16 bits (arXiv:2208.07339).",
    "llm_int8_skip_modules": "Modules that stay unquantized, in 4 bits as in 8; null excludes the output layer.",
    "llm_int8_enable_fp32_cpu_offload": "Allow layers on the CPU, in float32.",
    "llm_int8_has_fp16_weight": "Keep 16-bit weights beside the 8-bit ones.",
    "bnb_4bit_quant_storage": "Dtype that stores the packed 4-bit weights; FSDP needs that of the other weights.",
}

MEANINGS: dict[str, dict[str, str]] = {
    "TrainingArguments": _TRAINING,
    "LoraConfig": _LORA,
    "BitsAndBytesConfig": _QUANTIZATION,
}
"""The description of each key, with its unit, by class."""

Limit = dict[str, float]

_POSITIVE: Limit = {"ge": 1}
_COUNT: Limit = {"ge": 0}
_ABOVE_ZERO: Limit = {"gt": 0}
_SHARE: Limit = {"ge": 0, "lt": 1}
_SEED: Limit = {"ge": 0, "le": 2**32 - 1}  # what numpy takes

LIMITS: dict[str, dict[str, Limit]] = {
    "TrainingArguments": {
        "max_steps": {"ge": -1},
        **dict.fromkeys(("per_device_eval_batch_size", "gradient_accumulation_steps"), _POSITIVE),
        **dict.fromkeys(("eval_accumulation_steps", "torch_empty_cache_steps", "save_total_limit"), _POSITIVE),
        **dict.fromkeys(("dataloader_prefetch_factor", "ddp_bucket_cap_mb", "ddp_timeout"), _POSITIVE),
        **dict.fromkeys(("num_train_epochs", "adam_epsilon", "eval_steps", "save_steps"), _ABOVE_ZERO),
        **dict.fromkeys(("learning_rate", "weight_decay", "warmup_steps", "max_grad_norm"), _COUNT),
        **dict.fromkeys(("neftune_noise_alpha", "eval_delay", "dataloader_num_workers"), _COUNT),
        **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), _SHARE),
        **dict.fromkeys(("seed", "data_seed"), _SEED),
    },
    "ParallelismConfig": dict.fromkeys(
        ("dp_replicate_size", "dp_shard_size", "tp_size", "cp_size", "sp_size"), _POSITIVE
    ),
    "LoraConfig": {"qalora_group_size": _POSITIVE},
    "LoftQConfig": {"loftq_bits": _POSITIVE, "loftq_iter": _POSITIVE},
    "EvaConfig": {"rho": _POSITIVE, "tau": {"ge": 0, "le": 1}},
    "VeloraConfig": {"num_groups": _POSITIVE, "scale": _ABOVE_ZERO},
    "MontecloraConfig": {"num_samples": _POSITIVE, "dirichlet_prior": _ABOVE_ZERO, "buffer_size": _POSITIVE},
    "BdLoraConfig": {"nblocks": _POSITIVE},
    "ArrowConfig": {"top_k": _POSITIVE, "router_temperature": _ABOVE_ZERO},
    "BitsAndBytesConfig": {"llm_int8_threshold": _COUNT},
}
"""Smallest and largest values, by class and key, as pydantic's constraints."""

_NO_SHARDING = ("models are not sharded yet", "Remove it: processes train whole copies (DDP).")
_EVALUATION_DTYPE = ("evaluation computes in the dtype of training", "Remove it, or set `dtype`.")
_FUSED_HEAD = (
    "the output head is already fused with the loss here, and Liger's kernels would replace that",
    "Remove it; loss_chunk_size sets how many tokens' logits are in memory at a time.",
)
_UPLOAD = "hf upload USER/NAME OUTPUT_DIR . --exclude 'checkpoint-*' --exclude 'earlier-run-*' --exclude .lock"

UNSUPPORTED: dict[str, tuple[str, str]] = {
    "fsdp": _NO_SHARDING,
    "fsdp_config": _NO_SHARDING,
    "deepspeed": _NO_SHARDING,
    "parallelism_config": _NO_SHARDING,
    "bf16_full_eval": _EVALUATION_DTYPE,
    "fp16_full_eval": _EVALUATION_DTYPE,
    "use_liger_kernel": _FUSED_HEAD,
    "liger_kernel_config": _FUSED_HEAD,
    "auto_find_batch_size": (
        "would continue from weights that failed attempts have already trained, with another number of steps",
        "Write per_device_train_batch_size: auto, which tries sizes before the run and does not change it.",
    ),
    "enable_jit_checkpoint": (
        "a run that SIGTERM ended would look like a finished one",
        "Remove it; save_steps limits what an interrupted run loses.",
    ),
    "push_to_hub": (
        "uploads checkpoints, or nothing, instead of the final model",
        f"Remove it, and upload when the run is done: {_UPLOAD}",
    ),
}
"""Message and hint for each key of `TrainingArguments` that is refused: better an error than a key without effect."""
