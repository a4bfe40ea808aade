"""Names of Lightning 0.4 to 2.6 that are none here, and what to write instead.

A key may hold several names; `{value}` in an advice stands for the value that was given, `{name}` for the name.
"""

from __future__ import annotations


def _table(entries: dict[str, str], renamed: str = "", advice: str = "write {new}") -> dict[str, str]:
    """Advice by name; `renamed` has words such as "new=old,older"."""
    table = {name: text for names, text in entries.items() for name in names.split()}
    pairs = [word.split("=") for word in renamed.split()]
    return table | {old: advice.replace("{new}", new) for new, names in pairs for old in names.split(",")}


_VALUE = "write {new}={value}"
_BY_HAND = "set self.automatic_optimization = False, and in training_step use self.optimizers() and manual_backward"
_PART = f"{_BY_HAND} for each part of a sequence"
_DDP = 'write strategy="ddp", and start the program with torchrun'
_MEMORY = 'log torch.cuda.memory_allocated() by self.log("memory", ...) where you want it'
_NORM = "torch.nn.utils.get_total_norm([p.grad for p in self.parameters()])"
_OUT = "leave it out"

# Arguments, by the function or class that took them.
ARGUMENTS = {
    "Trainer": _table(
        {
            "gpus num_gpus": 'write accelerator="gpu", devices={value}',
            "num_processes": 'write accelerator="cpu", devices={value}',
            "tpu_cores num_tpu_cores ipus hpus": 'write accelerator="gpu" or "cpu"; nothing else is supported',
            "auto_select_gpus": "leave it out; CUDA_VISIBLE_DEVICES=2 in the environment chooses a GPU",
            "distributed_backend": _DDP,
            "use_amp amp_backend amp_level amp_type": 'write precision="16-mixed" or "bf16-mixed"',
            "auto_lr_find": "write callbacks=[LearningRateFinder()]",
            "auto_scale_batch_size": "leave it out, and give loaders the largest batch_size that fits",
            "resume_from_checkpoint": "write trainer.fit(..., ckpt_path={value})",
            "checkpoint_callback": "write enable_checkpointing=False for none, or callbacks=[ModelCheckpoint(...)]",
            "early_stop_callback": 'write callbacks=[EarlyStopping("val_loss")]',
            "weights_summary print_weights_summary": "write enable_model_summary=False for none, or "
            "callbacks=[ModelSummary(max_depth=1)], where -1 stands for all layers",
            "progress_bar_refresh_rate": "write enable_progress_bar=False for none, or "
            "callbacks=[TQDMProgressBar(refresh_rate={value})]",
            "log_gpu_memory": f"leave it out; {_MEMORY}",
            "flush_logs_every_n_steps log_save_interval": "leave it out; log_every_n_steps says when to write logs",
            "track_grad_norm": f'leave it out; in on_before_optimizer_step call self.log("grad_norm", {_NORM})',
            "truncated_bptt_steps": f"leave it out; {_PART}",
            "weights_save_path": "write callbacks=[ModelCheckpoint(dirpath={value})]",
            "stochastic_weight_avg": "write callbacks=[StochasticWeightAveraging(swa_lrs=0.01)]",
            "terminate_on_nan": 'leave it out; detect_nonfinite="raise" is the default',
            "multiple_trainloader_mode": "leave it out, and give one train loader that reads the others",
            "prepare_data_per_node automatic_optimization": "write self.{name} = {value} in the module",
            "reload_dataloaders_every_epoch": "write reload_dataloaders_every_n_epochs=1",
            "process_position move_metrics_to_cpu enable_pl_optimizer plugins model_registry": _OUT,
        },
        "num_nodes=nb_gpu_nodes,num_gpu_nodes enable_progress_bar=show_progress_bar gradient_clip_val=gradient_clip "
        "log_every_n_steps=row_log_interval,add_row_log_interval max_epochs=max_nb_epochs,max_num_epochs "
        "min_epochs=min_nb_epochs,min_num_epochs num_sanity_val_steps=nb_sanity_val_steps overfit_batches=overfit_pct "
        "default_root_dir=default_save_path detect_anomaly=print_nan_grads use_distributed_sampler=replace_sampler_ddp "
        "limit_train_batches=train_percent_check limit_val_batches=val_percent_check "
        "limit_test_batches=test_percent_check",
        _VALUE,
    ),
    "fit": _table({}, "train_dataloaders=train_dataloader val_dataloaders=val_dataloader", _VALUE),
    "validate": _table({}, "dataloaders=val_dataloaders,val_dataloader", _VALUE),
    "test": _table({}, "dataloaders=test_dataloaders,test_dataloader", _VALUE),
    "ModelCheckpoint": _table(
        {"filepath prefix": 'write dirpath="folder", filename="name-{epoch}"', "save_best_only": "write save_top_k=1"},
        "every_n_epochs=period,every_n_val_epochs",
        _VALUE,
    ),
    "DataModule": _table({"train_transforms val_transforms test_transforms dims": "set it in an __init__ of your own"}),
}
# Values of the Trainer's arguments; "dict" stands for every dict.
VALUES = {
    ("accumulate_grad_batches", "dict"): "write callbacks=[GradientAccumulationScheduler({value})]",
    ("max_steps", "None"): "write max_steps=-1",
    ("profiler", "True"): 'write profiler="simple"',
    **{("accelerator", name): _DDP.replace("write", 'write accelerator="auto",') for name in ("ddp", "fsdp")},
}
for _name in "ddp_cpu ddp_fork ddp_notebook ddp_spawn ddp2 dp horovod ddp_sharded ddp_sharded_spawn".split():
    VALUES |= {("accelerator", _name): VALUES["accelerator", "ddp"], ("strategy", _name): _DDP}

# Methods of modules, data modules and callbacks that are no hooks any more, or none of that class.
_START = "write on_train_epoch_start, and on_validation_epoch_start or on_test_epoch_start: it ran for each of them"
HOOKS = _table(
    {
        "on_epoch_start": _START,
        "on_epoch_end": _START.replace("start", "end"),
        "on_exception on_sanity_check_start on_sanity_check_end": "write it in a Callback",
        "get_progress_bar_dict get_tqdm_dict": "call self.log(..., prog_bar=True) in the steps",
        "tbptt_split_batch": _PART,
        "training_end validation_end test_end": "write on_train_epoch_end, on_validation_epoch_end or "
        "on_test_epoch_end; training_epoch_end(outputs) and the like work, too",
        "configure_ddp init_ddp_connection configure_apex amp_scale_loss configure_sync_batchnorm": "leave it out; "
        "the Trainer's strategy, precision and sync_batchnorm do it",
        "on_post_move_to_device add_to_queue get_from_queue": _OUT,
    },
    "on_fit_start=on_pretrain_routine_start,on_pretrain_routine_end configure_model=configure_sharded_model "
    "setup=on_init_start,on_init_end,on_configure_sharded_model,on_before_accelerator_backend_setup "
    "on_train_batch_start=on_batch_start on_train_batch_end=on_batch_end on_exception=on_keyboard_interrupt "
    "train_dataloader=on_train_dataloader,on_reset_train_dataloader,tng_dataloader "
    "val_dataloader=on_val_dataloader,on_reset_val_dataloader test_dataloader=on_test_dataloader,"
    "on_reset_test_dataloader predict_dataloader=on_predict_dataloader,on_reset_predict_dataloader "
    "on_save_checkpoint=on_hpc_save on_load_checkpoint=on_hpc_load on_before_optimizer_step=log_grad_norm "
    "on_validation_start=on_pre_performance_check on_validation_end=on_post_performance_check "
    # In a data module.
    "state_dict=on_save_checkpoint load_state_dict=on_load_checkpoint",
)
# Misspelt rather than old.
HOOKS |= _table(
    {},
    "validation_step=val_step,valid_step,eval_step training_step=train_step,forward_step "
    "on_train_epoch_end=train_epoch_end on_validation_epoch_end=val_epoch_end "
    "configure_optimizers=configure_optimizer,configure_scheduler,configure_schedulers",
    "did you mean {new}?",
)
# Parameters that hooks had, and what does their work now, if anything.
PARAMETERS = _table(
    {
        "optimizer_idx opt_idx": _BY_HAND,
        "hiddens": _PART,
        "outputs results": "keep outputs in a list of your own, at the end of each batch",
        "callback_state": "write load_state_dict(self, state_dict), which gets the state",
        "dataloader_iter on_tpu using_native_amp using_lbfgs use_amp second_order_closure unused dataloader_idx": "",
    }
)

# Attributes of Trainer.
_PARSER = 'write parser.add_argument("--max_epochs", type=int) and Trainer(max_epochs=args.max_epochs)'
TRAINER = _table(
    {
        "from_argparse_args add_argparse_args parse_argparser match_env_arguments default_attributes": _PARSER,
        "tune tuner lr_find": "write Trainer(callbacks=[LearningRateFinder()])",
        "scale_batch_size": "give loaders the largest batch_size that fits",
        "run_evaluation": "write trainer.validate(model) or trainer.test(model)",
        "train_loop fit_loop": "write trainer.current_epoch, trainer.global_step and the like",
        "reset_train_dataloader reset_val_dataloader": "write Trainer(reload_dataloaders_every_n_epochs=1)",
    },
    "lightning_module=get_model sanity_checking=running_sanity_check global_rank=proc_rank "
    "lr_scheduler_configs=lr_schedulers progress_bar_metrics=progress_bar_dict default_root_dir=weights_save_path "
    "num_devices=gpus,num_gpus,num_processes,root_gpu,tpu_cores precision=use_amp,amp_backend",
    "write trainer.{new}",
)

# Names in modules.
NAMES = _table(
    {
        "TrainResult EvalResult Result": "log by self.log(name, value), and return the loss",
        "data_loader": "write the loader's hook without a decorator",
        "auto_move_data": "write trainer.predict(model, dataloaders)",
        "GPUStatsMonitor XLAStatsMonitor GpuUsageLogger DeviceStatsMonitor": _MEMORY,
        "BaseFinetuning BackboneFinetuning": "freeze and unfreeze parameters in on_train_epoch_start",
        "WandbLogger MLFlowLogger CometLogger NeptuneLogger": "Lightning's own works: write Trainer(logger=...)",
        "LightningCLI": "main.py has its arguments from signatures, too",
        "Tuner": "write Trainer(callbacks=[LearningRateFinder()])",
        "LightningLite Fabric": "write a Module and a Trainer",
        "grad_norm": f"write {_NORM}",
        "DDPPlugin DDPSpawnPlugin DDPSpawnStrategy": 'write Trainer(strategy="ddp")',
        "FSDPStrategy DeepSpeedStrategy DDPFullyShardedStrategy": 'write Trainer(strategy="fsdp")',
    },
    "LearningRateMonitor=LearningRateLogger TensorBoardLogger=TestTubeLogger RichProgressBar=ProgressBarBase",
)
# Where Lightning has names that are elsewhere here.
MODULES = (
    "accelerators callbacks.base callbacks.callback callbacks.lr_logger callbacks.lr_monitor cli "
    "core core.datamodule core.decorators core.hooks core.lightning core.module core.saving core.step_result lite "
    "loggers.base loggers.mlflow loggers.wandb logging metrics.classification metrics.functional metrics.regression "
    "plugins profiler trainer.states trainer.trainer tuner utilities.cli utilities.cloud_io "
    "utilities.distributed utilities.exceptions utilities.model_summary utilities.rank_zero utilities.seed "
    "utilities.types"
).split()
# Types for annotations.
TYPES = "STEP_OUTPUT EPOCH_OUTPUT TRAIN_DATALOADERS EVAL_DATALOADERS OptimizerLRScheduler".split()
