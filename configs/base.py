"""Every key of a run, with its default: the paper's 758M/262M text model and settings.

An experiment imports this, changes what differs and nothing else. Any key can be set on the
command line: `--config.optimizer.learning_rate=3e-4`.
"""

import dataclasses

from ml_collections import ConfigDict

from megabyte_jax.models.config import ModelConfig
from megabyte_jax.models.presets import paper_model


def model(config: ModelConfig) -> ConfigDict:
    """The keys below `config.model`: the fields of the model's config class, documented there."""
    return ConfigDict(dataclasses.asdict(config))


def data() -> ConfigDict:
    """The keys below `config.data`; docs/data.md explains them."""
    config = ConfigDict()
    config.source = "stdlib"  # or tfds:NAME, a file, a directory, a glob; .gz, .xz, .zst too
    config.modality = "bytes"  # or image (PNG, JPEG), audio (WAV, FLAC)
    config.separator = ""  # of documents in training, of modality bytes; "" packs them
    config.max_bad_records = 0  # left out before the run stops: empty, damaged, ...
    config.cache_dir = ""  # for what is decoded once; "" is ~/.cache/megabyte_jax
    config.workers = 1  # threads that read ahead; 0 reads when the batch is due
    config.tfds = ConfigDict()  # of a source tfds:NAME
    config.tfds.data_dir = ""  # of prepared sets; "" is TFDS_DATA_DIR or ~/tensorflow_datasets
    config.tfds.feature = ""  # to read; "" the one called data, or the only one that fits
    config.image = ConfigDict()  # of modality image, RGB
    config.image.height = 64  # in pixels
    config.image.width = 64
    config.image.scan = "patch"  # as in the paper, in blocks that fill a patch; or raster
    config.image.resize = "none"  # all have the size; or box, lanczos, ...: crop, then resize
    config.audio = ConfigDict()  # of modality audio, 16-bit mono
    config.audio.sample_rate = 16_000  # per second
    config.split = ConfigDict()
    config.split.by = "document"  # by hash of the name; or bytes (in order); or name
    config.split.valid_size = 0.05  # a fraction; from 1 on, by bytes, a number of bytes
    config.split.test_size = 0.05
    config.split.train = "train"  # by name: the sub-folder, or TFDS split, as "train[:-5000]"
    config.split.valid = "valid"  # or validation, or val
    config.split.test = "test"
    return config


def get_config() -> ConfigDict:
    """Returns the default config."""
    config = ConfigDict()
    config.seed = 0  # of initial weights, dropout, order of the data and samples
    config.model = model(paper_model("758m_262m"))

    config.data = data()

    config.mesh = ConfigDict()  # devices along each axis, -1 for what the others leave
    config.mesh.data = -1  # splits the batch
    config.mesh.fsdp = 1  # splits the batch, the parameters and the optimizer's state
    config.mesh.sequence = 1  # splits the patches of a sequence
    config.mesh.tensor = 1  # splits heads and hidden widths

    config.train = ConfigDict()
    config.train.batch_size = 48  # sequences of model.seq_len bytes per update, over all hosts
    config.train.grad_accumulation = 1  # parts of a batch computed one after another
    config.train.num_bytes = 80_000_000_000  # budget in bytes; 0 if given in updates
    config.train.num_steps = 0  # budget in updates; 0 if given in bytes
    config.train.skip = ()  # batches left out, as ((first, stop), ...); the update's number, from 0

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # as in the paper; or muon
    config.optimizer.learning_rate = 2e-4  # at its peak
    config.optimizer.schedule = "linear"  # after the warm-up; or cosine, constant
    config.optimizer.end_fraction = 0.0  # of the peak, left at the end
    config.optimizer.warmup_steps = 500  # in updates; 0 if given in bytes
    config.optimizer.warmup_bytes = 0
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.98
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 0.1
    config.optimizer.clip_norm = 1.0
    config.optimizer.state_dtype = "float32"  # of its moments; or bfloat16
    config.optimizer.offload = False  # keeps its state in the memory of the hosts

    # What becomes of an update whose loss, gradients or state are not finite, or that is a spike.
    config.guard = ConfigDict()
    config.guard.policy = "abort"  # or skip_update, or rollback_skip: back, and skip its batches
    config.guard.max_loss = 0.0  # bits per byte, above which it is a spike; 0 for none
    config.guard.max_grad_norm = 0.0  # of the gradients before clipping, likewise
    config.guard.rollback_window = 100  # batches skipped before and after it by rollback_skip
    config.guard.max_skips = 10  # skips in a row, or rollbacks, after which the run ends
    config.guard.replica_interval = 1000  # updates between comparisons of replicas; 0 for never

    # After how long without progress a run is stopped, in seconds; 0 for never.
    config.watchdog = ConfigDict()
    config.watchdog.step_seconds = 600.0  # in an update
    config.watchdog.data_seconds = 300.0  # waiting for a batch
    config.watchdog.pause_seconds = 7200.0  # compiling, evaluating, sampling or saving
    config.watchdog.peer_seconds = 60.0  # without a sign of life of another process

    # Intervals are in updates; 0 means never, except at the end of the run.
    config.log_interval = 10
    config.eval = ConfigDict()  # in training, on the validation split
    config.eval.interval = 1000
    config.eval.batch_size = 48
    config.eval.num_bytes = 4_000_000  # at most; 0 for the whole split
    config.sample = ConfigDict()
    config.sample.interval = 1000
    config.sample.prompt = ""
    config.sample.num_bytes = 256  # 0 for no samples; of an image, what is missing is black
    config.sample.temperature = 1.0
    config.checkpoint = ConfigDict()
    config.checkpoint.interval = 1000
    config.checkpoint.keep = 2  # newest ones, at least 2
    config.checkpoint.keep_interval = 0  # updates between the ones kept for good
    return config
