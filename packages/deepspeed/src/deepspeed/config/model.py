"""The whole config as one type: top-level keys and the sections of the `model_*` files.

`ConfigModel` is what the user asked for, checked key by key, without knowledge of ranks or devices. `resolve` turns
it into a `ResolvedConfig`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from deepspeed.config.base import FloatDtype, FreeForm, Interval, NonNegative, Positive, Real, Section
from deepspeed.config.model_data import DataEfficiency
from deepspeed.config.model_observe import Comet, CommsLogger, CsvMonitor, FlopsProfiler, TensorBoard, Timers, WandB
from deepspeed.config.model_optimizer import OptimizerSection, SchedulerSection
from deepspeed.config.model_parked import (
    Autotuning,
    Eigenvalue,
    Elasticity,
    LegacyCurriculum,
    Nebula,
    ProgressiveLayerDrop,
    QuantizeTraining,
    WeightQuantization,
)
from deepspeed.config.model_precision import Amp, Bf16, DataTypes, Fp16, TorchAutocast
from deepspeed.config.model_runtime import (
    ActivationCheckpointing,
    Checkpoint,
    Compile,
    ExpertParallel,
    HybridEngine,
    Kernels,
    Pipeline,
    TensorParallel,
)
from deepspeed.config.model_zero import Aio, ZeroSection

__all__ = ["ConfigModel"]


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


LogLevel = Annotated[Literal["debug", "info", "warning", "error", "critical"], BeforeValidator(_lower)]


class ConfigModel(Section):
    """A DeepSpeed config: every key is optional except that a training run needs a batch size."""

    train_batch_size: Positive | None = None
    """Samples per optimizer step over all ranks; derived from the other two when absent."""
    train_micro_batch_size_per_gpu: Positive | None = None
    """Samples per forward pass of one rank; derived when absent."""
    gradient_accumulation_steps: Positive | None = None
    """Micro-batches per optimizer step; derived when absent."""
    managed_gradient_accumulation: bool = True
    """The engine counts micro-batches and steps at the boundary; false makes every step() a boundary."""
    steps_per_print: Interval | None = None
    """Log progress every so many steps; none, 0 and infinity never do."""
    wall_clock_breakdown: bool = False
    """Time forward, backward and step."""
    memory_breakdown: bool = False
    """Log memory use at many points."""
    dump_state: bool = False
    """Log the whole state of the engine once it is built."""
    gradient_clipping: NonNegative = 1.0
    """Largest global L2 norm of the gradient; larger ones are scaled down. 0 disables clipping."""
    prescale_gradients: bool = False
    """Divide gradients before their reduction instead of after."""
    gradient_predivide_factor: Annotated[Real, Field(gt=0)] = 1.0
    """Extra division before the reduction, undone after it."""
    gradient_allreduce_op: Literal["mean", "sum"] = "mean"
    """Average gradients over data-parallel ranks, or add them."""
    communication_data_type: FloatDtype | None = None
    """Dtype in which gradients travel; none takes the model dtype."""
    seq_parallel_communication_data_type: FloatDtype = "fp32"
    """Upstream's dtype of gradients when sequence parallelism is on."""
    sparse_gradients: bool = False
    """Reduce gradients of nn.Embedding as indices and values."""
    disable_allgather: bool = False
    """Parsed but never used upstream."""
    zero_allow_untested_optimizer: bool = False
    """Allow optimizers that upstream had not tested with ZeRO."""
    zero_force_ds_cpu_optimizer: bool = True
    """Refuse optimizers other than DeepSpeed's own when the optimizer is offloaded."""
    graph_harvesting: bool = False
    """Upstream's CUDA graphs for short kernels in its bf16 optimizer."""
    dataloader_drop_last: bool = False
    """Drop the last partial batch of the loader that the engine builds."""
    vocabulary_size: Positive | None = None
    """Upstream only warns when it is not a multiple of 8."""
    log_level: LogLevel | None = None
    """Level of the deepspeed logger."""
    use_data_before_expert_parallelism: bool = False
    """Rank layout with data before expert groups."""
    sequence_parallel_size: Positive | None = None
    """Ranks that share one sequence; batches are counted over the world divided by them."""
    data_parallel_size: Positive | None = None
    """Data-parallel ranks; checked against the world."""
    disable_python_gc: bool = False
    """Turn off Python's cyclic garbage collector and collect between steps."""
    allgather_size: Positive | None = None
    """Deprecated: zero_optimization.allgather_bucket_size, used with `"zero_optimization": true`."""

    optimizer: OptimizerSection | None = None
    """Optimizer by name."""
    scheduler: SchedulerSection | None = None
    """Learning rate schedule by name."""
    fp16: Fp16 = Fp16()
    """fp16 with loss scaling."""
    bf16: Bf16 = Bf16()
    """bf16 with fp32 master weights."""
    amp: Amp = Amp()
    """Apex mixed precision."""
    torch_autocast: TorchAutocast = TorchAutocast()
    """torch.autocast in forward."""
    data_types: DataTypes = DataTypes()
    """Dtypes that differ from the model's."""
    zero_optimization: ZeroSection = ZeroSection()
    """Sharding of model states."""
    aio: Aio = Aio()
    """File I/O of the nvme tier."""
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing()
    """Recomputing activations."""
    pipeline: Pipeline = Pipeline()
    """Pipeline parallelism."""
    checkpoint: Checkpoint = Checkpoint()
    """Saving and loading."""
    comms_logger: CommsLogger = CommsLogger()
    """Log of collectives."""
    flops_profiler: FlopsProfiler = FlopsProfiler()
    """Count of operations."""
    tensorboard: TensorBoard = TensorBoard()
    """Scalars for TensorBoard."""
    wandb: WandB = WandB()
    """Scalars for Weights & Biases."""
    csv_monitor: CsvMonitor = CsvMonitor()
    """Scalars as CSV."""
    comet: Comet = Comet()
    """Scalars for Comet."""
    timers: Timers = Timers()
    """Timers."""
    tensor_parallel: TensorParallel = TensorParallel()
    """Automatic tensor parallelism."""
    expert_parallel: ExpertParallel = ExpertParallel()
    """Automatic expert parallelism."""
    compile: Compile = Compile()
    """Compiler passes."""
    hybrid_engine: HybridEngine = HybridEngine()
    """Training and generation in turn."""
    kernels: Kernels = Kernels()
    """Fused operations in the model."""
    data_efficiency: DataEfficiency = DataEfficiency()
    """Choice of samples and tokens."""
    curriculum_learning: LegacyCurriculum = LegacyCurriculum()
    """Older curriculum block."""
    compression_training: FreeForm | None = None
    """Pruning and quantisation during training; contents are not checked."""
    elasticity: Elasticity = Elasticity()
    """Elastic batch sizes."""
    autotuning: Autotuning = Autotuning()
    """Search for a fast config."""
    eigenvalue: Eigenvalue = Eigenvalue()
    """Curvature estimates."""
    progressive_layer_drop: ProgressiveLayerDrop = ProgressiveLayerDrop()
    """Skipping layers."""
    sparse_attention: FreeForm | None = None
    """Block-sparse attention; contents are not checked."""
    quantize_training: QuantizeTraining = QuantizeTraining()
    """Older quantisation training."""
    weight_quantization: WeightQuantization | None = None
    """Weights quantised at load time."""
    nebula: Nebula = Nebula()
    """Checkpoint service."""
    datastates_ckpt: FreeForm | None = None
    """External checkpoint engine; contents are not checked."""
