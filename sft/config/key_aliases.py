"""Names that other trainers and older releases give our keys, for the hint on an unknown key."""

from __future__ import annotations

_NAMES_ELSEWHERE = {
    "model_name_or_path": "model model_name model_path model_id base_model pretrained_model_name_or_path",
    "tokenizer_name_or_path": "tokenizer tokenizer_name",
    "model_revision": "revision",
    "dtype": "torch_dtype",
    "attn_implementation": "use_flash_attention_2 flash_attention flash_attn",
    "from_scratch": "init_from_scratch",
    "dataset_name": "dataset dataset_id",
    "dataset_config_name": "dataset_config",
    "train_file": "data_path train_data train_data_path train_path train_files training_file",
    "validation_file": "val_file valid_file eval_file test_file val_data_path validation_files",
    "validation_split": "val_size val_set_size test_size validation_split_percentage",
    "columns": "dataset_text_field column_mapping",
    "format": "dataset_format data_format",
    "system_prompt": "system_message",
    "train_on": "assistant_only_loss completion_only_loss train_on_inputs train_on_prompt",
    "max_seq_length": "max_length max_seq_len model_max_length sequence_len seq_length cutoff_len block_size",
    "packing": "sample_packing packing_strategy",
    "preprocessing_num_workers": "dataset_num_proc num_proc",
    "eval_strategy": "evaluation_strategy",
    "per_device_train_batch_size": (
        "batch_size train_batch_size micro_batch_size per_device_batch_size per_gpu_train_batch_size"
    ),
    "per_device_eval_batch_size": "per_gpu_eval_batch_size eval_batch_size",
    "gradient_accumulation_steps": "grad_accum grad_accumulation_steps",
    "learning_rate": "lr",
    "num_train_epochs": "epochs num_epochs",
    "max_steps": "steps num_train_steps",
    "lr_scheduler_type": "lr_scheduler scheduler",
    "optim": "optimizer",
    "max_grad_norm": "grad_clip gradient_clipping",
    "warmup_steps": "warmup",
    "train_sampling_strategy": "group_by_length",
    "resume_from_checkpoint": "resume auto_resume_from_checkpoints overwrite_output_dir",
    "loss_chunk_size": "use_liger",
    "use_cpu": "no_cuda",
    "include_num_input_tokens_seen": "include_tokens_per_second",
    "run_name": "wandb_run_name wandb_name",
    "logging_dir": "tensorboard_dir",
    "num_gpus": "gpus n_gpus",
    "deepspeed": "deepspeed_config",
    "lora_config": "lora peft_config use_lora use_peft",
    "lora_config.r": "lora_r lora_rank rank",
    "lora_config.lora_alpha": "alpha",
    "lora_config.lora_dropout": "dropout",
    "lora_config.target_modules": "lora_target lora_target_modules lora_target_linear",
    "lora_config.modules_to_save": "lora_modules_to_save",
    "quantization_config": "quantization bnb_config",
    "quantization_config.load_in_4bit": "quantization_bit use_4bit load_4bit",
    "quantization_config.load_in_8bit": "use_8bit",
    "quantization_config.bnb_4bit_use_double_quant": "use_nested_quant bnb_4bit_double_quant",
}
"""The names of each of our keys elsewhere."""

KEY_ALIASES = {name: key for key, names in _NAMES_ELSEWHERE.items() for name in names.split()}
"""Our key by its name elsewhere."""

HINTS: dict[str, str] = {
    "group_by_length": "Write train_sampling_strategy: group_by_length.",
    "use_flash_attention_2": "Write attn_implementation: flash_attention_2.",
    "flash_attention": "Write attn_implementation: flash_attention_2.",
    "dataset_text_field": "Write columns: {text: YOUR_COLUMN}.",
    "assistant_only_loss": "Write train_on: assistant, which is the default.",
    "completion_only_loss": "Write train_on: assistant, which is the default.",
    "train_on_inputs": "Write train_on: all to train the prompts too.",
    "train_on_prompt": "Write train_on: all to train the prompts too.",
    "use_lora": "Write a lora_config section; lora_config: {} takes every default.",
    "use_peft": "Write a lora_config section; lora_config: {} takes every default.",
    "overwrite_output_dir": "Remove it. resume_from_checkpoint decides whether a run resumes or starts at step 0.",
    "validation_split_percentage": "Write validation_split as a share, e.g. 0.05 for 5 percent.",
    "use_liger": "Remove it: the output head is already fused with the loss; loss_chunk_size sets its chunk size.",
    "quantization_bit": "Write quantization_config: {load_in_4bit: true}.",
}
"""What to write where an alias alone does not say it."""
