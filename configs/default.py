"""Every field of lit_jax, once, with its meaning and unit; experiments import this and change a few lines.

The defaults are the paper's class-conditional recipe at ImageNet 256 (LiT-XL/2 from DiT-XL/2). `teacher.checkpoint` and
the data are the user's to name:

    python -m lit_jax.main --config=configs/default.py --workdir=runs/xl2 \
        --config.teacher.checkpoint=DiT-XL-2-256x256.pt --config.data.name=... --config.data.dir=...
"""

import ml_collections
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # root of every random draw: init, data order, noise, samples
    config.compilation_cache = (
        ""  # folder of compiled programs; empty: JAX_COMPILATION_CACHE_DIR, or none
    )

    config.model = ConfigDict(
        dict(
            family="dit",  # models/__init__.py: dit
            size="XL",  # Ti, S, B, L, XL: depth, width and heads (models/dit.py)
            depth=0,  # blocks; 0: the size's
            width=0,  # D; 0: the size's
            num_heads=0,  # 0: the size's own for the attention; LiT S/B/L/XL have 2/3/4/4
            patch_size=2,  # pixels (or latent cells) a token spans, each way
            attention="linear",  # linear (LiT) or softmax (DiT)
            num_classes=1000,  # the null class of guidance comes on top
            input_size=32,  # height = width of the images or latents
            in_channels=4,  # 4 for SD latents, 3 for RGB pixels, 1 for grey
            learn_sigma=True,  # predict the variance too: twice the output channels
            qkv_bias=True,  # bias of qkv, or of q and kv
            kernel_function="relu",  # linear: relu, gelu, focused, focused_gelu (paper's ablation)
            conv_size=5,  # linear: depth-wise convolution K x K of v; 0: none
            implementation=ml_collections.config_dict.placeholder(
                str
            ),  # xla, pallas_tpu, pallas_gpu; None: by platform
            timestep_freq_shift=0,  # 0: official DiT, 1: diffusers
            mlp_norm_epsilon=1e-6,  # 1e-6: official DiT, 1e-5: diffusers
            dtype="bfloat16",  # of activations and matmuls: bfloat16 or float32
        )
    )

    # The frozen model that is inherited from and distilled. No checkpoint: plain diffusion training.
    config.teacher = ConfigDict(
        dict(
            checkpoint="",  # official DiT .pt or .safetensors, diffusers folder, Orbax folder, workdir
            weights="ema",  # ema or model, where a training checkpoint has both
            size="",  # the checkpoint must be of it; a plan without one: empty is model.size
            num_heads=0,  # softmax heads; 0: the size's, or what the checkpoint says
            dtype="bfloat16",  # it is kept and run in this
            implementation=ml_collections.config_dict.placeholder(
                str
            ),  # softmax: xla, cudnn, pallas_tpu; None: by platform
        )
    )

    config.student = ConfigDict(
        dict(
            init="teacher",  # teacher, random, or a checkpoint path: what the student inherits from
            weights="ema",  # ema or model, where the training checkpoint of that path has both
        )
    )
    config.inherit = ConfigDict(
        dict(
            load=(),  # attention parts that are loaded too: any of q, k, v, o, conv
            keep_init=(),  # parameter paths that stay at init though the source has them, e.g. final_layer
        )
    )

    # Loss = mse + vb + noise_weight * kd_noise + variance_weight * kd_variance (paper, hybrid distillation).
    config.distill = ConfigDict(
        dict(
            noise_weight=0.5,  # lambda_1
            variance_weight=0.05,  # lambda_2
            variance_target="raw",  # raw: the variance head's values; log_variance: what they stand for
            teacher_sees_dropped_labels=False,  # False: as the paper's code, the teacher always sees the label
        )
    )

    config.data = ConfigDict(
        dict(
            name="imagenet2012",  # TFDS data set of one image size, or what --mode=prepare wrote; mnist_digits
            #   is written on first use
            dir="data",  # TFDS directory
            split="train",
            flip=True,  # random horizontal flip
            num_threads=8,  # reader threads a process
            prefetch=64,  # batches read ahead
        )
    )

    # What stands between images and the model. No checkpoint: the model works on pixels.
    config.autoencoder = ConfigDict(
        dict(
            checkpoint="",  # AutoencoderKL: diffusers folder, torch or safetensors file, Orbax folder
            scaling_factor=0.0,  # of the latents; 0: as the checkpoint says (SD 0.18215)
            dtype="float32",  # it runs in this: float32 or bfloat16
            slice_size=8,  # images a device passes through it at once; 0: all of its share
            tile_size=0,  # latent cells a side of the tiles of larger images, a multiple of 4 (64 is
            #   what the models were trained at); 0: whole
        )
    )

    # --mode=prepare: source -> ADM centre crop -> autoencoder -> the data set data.name in data.dir, split data.split.
    config.prepare = ConfigDict(
        dict(
            source="imagenet2012",  # a TFDS image data set; with a slash: a folder of class folders of images
            dir="",  # TFDS directory of the source; empty: data.dir
            split="",  # of the source, slices such as train[:1000] too; empty: data.split
            image_size=256,  # pixels, height = width after the crop
            batch_size=64,  # images encoded at once, over all devices
            shard_records=1024,  # records a file: what an interruption loses, at most, a process
        )
    )

    config.train = ConfigDict(
        dict(
            batch_size=256,  # global
            steps=400_000,  # total, resumed runs included
            label_dropout=0.1,  # share of labels replaced by the null class
            accumulation=1,  # microbatches a step
            remat="dots",  # none, dots, full: what the backward pass recomputes
            log_every=100,  # steps between log lines
            preview_every=10_000,  # steps between preview grids; 0: none
            preview_images=8,  # images a row
            watchdog=900.0,  # seconds without an ended step after which all stacks are printed; 0: never
            stop_after_bad_steps=10,  # steps in a row with a non-finite loss or gradient before the run stops
        profile=(),  # first and last step of a profiler trace in workdir/profile; (): none
        )
    )
    config.optimizer = ConfigDict(
        dict(
            learning_rate=1e-4,  # AdamW
            b1=0.9,
            b2=0.999,
            epsilon=1e-8,
            weight_decay=0.0,
            clip_norm=0.0,  # global gradient norm; 0: no clipping
            schedule="constant",  # constant, or cosine to zero at train.steps
            warmup=0,  # steps of linear warm-up
        )
    )
    config.ema = ConfigDict(
        dict(
            decay=0.9999,
            warmup=False,  # decay min(decay, (1 + step) / (10 + step)): for short runs
        )
    )
    config.mesh = ConfigDict(
        dict(
            data=-1,  # replicas of the parameters; -1: all devices that are left
            fsdp=1,  # devices that share one copy of parameters and optimizer state
            cpu_devices=0,  # on a CPU: devices it pretends to be, a core each; 0: as JAX decides
            join_timeout=300,  # seconds to wait at the start for processes that do not come
            heartbeat=100,  # seconds of silence after which a process counts as gone
        )
    )
    config.checkpoint = ConfigDict(
        dict(
            every=5_000,  # steps
            keep=3,  # the newest
            keep_every=100_000,  # and every so many steps for good; 0: none
            force_config=False,  # go on from one though fields that decide the result have changed since
        )
    )

    config.sample = ConfigDict(
        dict(
            checkpoint="",  # what --mode=sample reads; empty: the workdir
            sampler="ddpm",  # ddpm, ddim, dpm++
            steps=250,  # model evaluations an image
            spacing="",  # timesteps: respaced, leading, trailing, linspace; empty: the sampler's own
            variance="",  # ddpm's noise: learned_range, fixed_small, fixed_large; empty: learned_range,
            #   or fixed_large of a model without a variance head
            eta=0.0,  # ddim's noise: 0 none, 1 as much as ddpm
            order=2,  # dpm++'s order, 1 to 3
            num_images=64,
            batch_size=64,  # global
            cfg_scale=1.5,  # 1: no guidance
            cfg_channels="3",  # leading channels that are guided: 3 (DiT's), or all
            cfg_interval=(0.0, 1000.0),  # guided where low <= t <= high, in training timesteps
            labels="random",  # random (DiT's protocol) or balanced over the classes
            clip_denoised=False,  # clip the predicted image to [-1, 1]: for pixels
        )
    )

    # --mode=port: a checkpoint of any layout into another; docs/porting.md.
    config.port = ConfigDict(
        dict(
            source="",  # .pt, .safetensors, .ckpt, a diffusers or Orbax folder, a workdir
            target="",  # .pt, .safetensors or a new folder
            layout="",  # orbax, dit, diffusers; empty: dit for a file, orbax for a folder
            weights="ema",  # ema or model, where a training checkpoint has both
            num_heads=0,  # where nothing in the source tells it; 0: as it says, or the published size's
            num_classes=0,  # resize the label table to this; 0: keep it
            input_size=0,  # recompute the position table for this size; 0: keep it
            scaling_factor=0.0,  # of an autoencoder that does not say its own; 0: as it says
            timestep_freq_shift=ml_collections.config_dict.placeholder(
                int
            ),  # None: as the source's own code computes
            mlp_norm_epsilon=ml_collections.config_dict.placeholder(float),  # None: likewise
            check_model=True,  # the source must be what config.model (or a teacher of it) says
        )
    )

    # --mode=evaluate, and evaluation during training; docs/evaluation.md.
    config.evaluate = ConfigDict(
        dict(
            every=0,  # training: steps between evaluations of the EMA weights; 0: none
            every_images=1_000,  # and how many images they draw, balanced over the classes
            features="efficientnet_lite0",  # or inception_adm, inception_pytorch_fid, inception_clean
            weights="",  # Inception weights, .pth or .pickle; empty: the EfficientNet package's
            samples="",  # npz of uint8 images; empty: workdir/samples.npz
            reference="",  # npz, or DATASET:SPLIT of data.dir
            num_images=50_000,  # images scored, the first of the file; 0: all
            batch_size=64,  # images through the network at once
            num_neighbour_images=10_000,  # reference images that precision and recall look at, at most
            neighbours=3,  # k of precision and recall
            split_size=5_000,  # images a split of the Inception score
            self_check=False,  # hold the scores against ADM's published ones
            compare=(),  # evaluation_*.json to set side by side instead
            compare_across=("samples.cfg_scale",),  # protocol fields that may differ between them
        )
    )
    config.benchmark = ConfigDict(
        dict(
            what=("attention", "model"),  # any of attention, model, data
            pixels=(256, 512, 1024),  # image sizes; of latents, whose cells are 8 pixels wide
            attention_tokens=32_768,  # B * T of the attention's batches
            model_tokens=16_384,  # and a device of the models'
            repeats=10,  # medians are over these, each of 10 calls
            topology="v5e:2x2",  # on a CPU: the TPU whose compiler estimates the kernels
        )
    )

    config.plan = ConfigDict(
        dict(
            topology="v5e:2x4",  # TPU slice: v4:2x2x2, v5e:16x16, v5p:4x4x4, v6e:4x4, ...
            slices=1,  # how many such slices, joined by the data center's network
            programs=(
                "distill",
                "plain",
                "sample",
            ),  # any of distill (the step with a teacher), plain, sample
            largest_batch=False,  # look for the largest batch that fits even where the config's does
        )
    )

    # What a training run draws at its end, with student and teacher, for its report and samples.png.
    config.report = ConfigDict(
        dict(
            num_images=0,  # balanced over the classes, by sample.*; 0: no report
            read_labels=False,  # fit a pixel classifier on the real images and let it read them
        )
    )
    return config.lock()  # an experiment that misspells a field fails where it does
