r"""Every field of lit_jax, once, with its meaning and unit.

An experiment imports this config and changes a few lines. The defaults are the paper's
class-conditional recipe at ImageNet 256: LiT-XL/2 from DiT-XL/2. The user has to name the
teacher's checkpoint and the data:

    python -m lit_jax.main --config=configs/default.py --workdir=runs/xl2 \
        --config.teacher.checkpoint=DiT-XL-2-256x256.pt \
        --config.data.name=... --config.data.dir=...

A comment stands behind its field, or above it where it is long. "0: ..." and "empty: ..." say
what that value means.
"""

import ml_collections
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()

    # The root of every random draw: initial parameters, order of the data, noise, samples.
    config.seed = 0

    # Folder of compiled programs, which the next start loads. auto: what JAX_COMPILATION_CACHE_DIR
    # names, or ~/.cache/lit_jax. Empty: none.
    config.compilation_cache = "auto"

    # The model that is trained, sampled and evaluated: the student, where there is a teacher.
    config.model = ConfigDict(
        dict(
            family="dit",  # a name in lit_jax/models/__init__.py: dit or pixart
            # Ti, S, B, L or XL: gives depth, width and heads (lit_jax/models/architecture.py).
            size="XL",
            depth=0,  # number of blocks; 0: that of the size
            width=0,  # D, channels of a token; 0: that of the size
            # 0: the size's number for the attention. LiT-S, B, L, XL have 2, 3, 4, 4; the other
            # designs have those of softmax, 6, 12, 16, 16.
            num_heads=0,
            patch_size=2,  # pixels (or latent cells) along each side of a token's patch
            # linear (LiT), softmax (DiT), or another linear attention: mhla, mala, dit5
            # (docs/workbench.md).
            attention="linear",
            num_classes=1000,  # without the null class of guidance, which is added
            # Height = width of the images or latents, or (height, width).
            input_size=ml_collections.FieldReference(32, field_type=object),
            in_channels=4,  # 4: SD latents; 3: RGB pixels; 1: grey pixels
            # What the model predicts: noise (DiT), or the velocity of a straight path (SiT), whose
            # samplers are euler, heun and euler_maruyama. Checkpoints hold it.
            prediction="noise",
            # Predict the variance too: twice the output channels. A velocity has no variance;
            # SiT's models have these channels all the same and do not use them.
            learn_sigma=True,
            qkv_bias=True,  # the layer qkv (softmax), or q and kv (linear), has a bias
            # linear, mhla: relu, gelu, focused or focused_gelu, as in the paper's ablation.
            kernel_function="relu",
            # linear, mhla, mala: side of the depth-wise convolution of v. dit5: of those of q and
            # k. 0: no convolution.
            conv_size=5,
            # Of a linear attention: every so many-th layer keeps softmax, inherited whole; 0: none.
            softmax_every=0,
            softmax_heads=0,  # of those layers; 0: the size's
            num_blocks=16,  # mhla: square blocks of the image, each with its own state
            # xla, pallas_tpu or pallas_gpu; None: chosen by platform.
            implementation=ml_collections.config_dict.placeholder(str),
            # Fields of the family dit, as num_classes above. Another family's recipe sets them to
            # None and has its own beside them: configs/pixart_sigma_512.py.
            timestep_freq_shift=0,  # 0: official DiT; 1: diffusers
            mlp_norm_epsilon=1e-6,  # 1e-6: official DiT; 1e-5: diffusers
            dtype="bfloat16",  # of activations and matmuls: bfloat16 or float32
        )
    )

    # The frozen model that the student inherits from and is distilled from.
    config.teacher = ConfigDict(
        dict(
            # Official .pt, .pth or .safetensors, diffusers folder or pipeline, Orbax folder or
            # workdir. Empty: no teacher, so the run is plain diffusion training.
            checkpoint="",
            weights="ema",  # ema or model, where a training checkpoint has both
            # The checkpoint must have this size; empty: any size. A plan that has no checkpoint
            # takes the teacher's size from here; empty: model.size.
            size="",
            num_heads=0,  # softmax heads; 0: the size's, or what the checkpoint says
            dtype="bfloat16",  # of its parameters, activations and matmuls
            # Softmax attention: xla, cudnn or pallas_tpu; None: chosen by platform.
            implementation=ml_collections.config_dict.placeholder(str),
        )
    )

    # Where the student's first parameters come from.
    config.student = ConfigDict(
        dict(
            # teacher, random, or the path of a checkpoint to inherit from. One with another number
            # of classes keeps the null class and the first classes; further rows are drawn.
            init="teacher",
            weights="ema",  # ema or model, where the training checkpoint of that path has both
        )
    )

    # What the student inherits besides everything outside attention.
    config.inherit = ConfigDict(
        dict(
            # Parts of attention that are loaded too: any of q, k, v, o, conv, rest; () for none.
            # auto: all of them where source and student have the same attention, else none.
            load=("auto",),
            # Parameter paths that stay at their init although the checkpoint has them,
            # e.g. final_layer.
            keep_init=(),
        )
    )

    # Hybrid distillation (paper):
    # loss = mse + vb + noise_weight * kd_noise + variance_weight * kd_variance.
    # denoising_weight multiplies mse + vb, and attention_weight * kd_attention and
    # feature_weight * kd_features are added.
    config.distill = ConfigDict(
        dict(
            noise_weight=0.5,  # lambda_1 of the paper
            variance_weight=0.05,  # lambda_2 of the paper
            denoising_weight=1.0,  # of mse and vb; without a teacher it is 1
            # Of the layer-wise regression: each attention learns what the teacher's gives for the
            # teacher's own input. With the other weights at 0 nothing else is computed.
            attention_weight=0.0,
            # Of what each attention gives in the student, against what it gives in the teacher.
            feature_weight=0.0,
            # raw: compare the values of the variance heads.
            # log_variance: compare the log-variances that these values stand for.
            variance_target="raw",
            # False: the teacher always sees the label, as in the paper's code.
            teacher_sees_dropped_labels=False,
        )
    )

    # The data that training reads. Up to 1 GiB of decoded pictures stays in memory.
    config.data = ConfigDict(
        dict(
            # A TFDS data set whose images have one size, or what --mode=prepare wrote.
            # mnist_digits is written on first use.
            name="imagenet2012",
            dir="data",  # TFDS directory
            split="train",  # train[:1000] and train+test too
            flip=True,  # flip half of the images horizontally, at random
            num_threads=8,  # reader threads of each process
            prefetch=64,  # batches read ahead
        )
    )

    # What stands between images and the model.
    config.autoencoder = ConfigDict(
        dict(
            # AutoencoderKL: diffusers folder, torch or safetensors file, or Orbax folder.
            # Empty: the model works on pixels.
            checkpoint="",
            scaling_factor=0.0,  # of the latents; 0: what the checkpoint says (SD: 0.18215)
            dtype="float32",  # of its activations and matmuls: float32 or bfloat16
            slice_size=8,  # images that a device puts through it at once; 0: all of its share
            # Larger images are cut into tiles with this many latent cells a side, a multiple
            # of 4 (the published models were trained at 64); 0: images stay whole.
            tile_size=0,
        )
    )

    # --mode=prepare: images -> ADM's centre crop -> autoencoder -> the data set data.name, in
    # data.dir, with the split data.split.
    config.prepare = ConfigDict(
        dict(
            # A TFDS data set of images, or a folder that has one folder of images for each
            # class. A name with a slash is a folder where there is one.
            # With captions: LIST.json, LIST.jsonl, a folder of images with NAME.txt beside them,
            # or tar files as of WebDataset, too.
            # TFDS configs go with their set: imagenet_resized/64x64.
            # teacher: what teacher.checkpoint draws, as config.sample says: no images are needed.
            source="imagenet2012",
            # TFDS directory of prepare.source; empty: data.dir. Of a list: where its paths start;
            # empty: the folder InternImgs beside its own, or its own.
            dir="",
            # Split of prepare.source, slices such as train[:1000] too; empty: data.split.
            split="",
            # Pixels after the crop: height = width, or (height, width). With captions: the side
            # of the square bucket. 0: those of model.input_size, times 8 with an autoencoder.
            image_size=ml_collections.FieldReference(0, field_type=object),
            # With captions: ("all",), the 40 aspects of PixArt-Sigma's table, or some of them;
            # ("16x16",): squares alone.
            buckets=("all",),
            # features: the text encoder's, 8 KB a token of T5-XXL; text: the captions alone, which
            # training encodes at every step.
            captions="features",
            # How features are stored: bfloat16, or int8 with a scale a token.
            caption_dtype="bfloat16",
            # Colour behind transparent pixels, a name or #rrggbb. Empty: as in ADM, which
            # shows the colours that a program left in invisible pixels.
            background="white",
            exif_orientation=True,  # turn pictures as their camera says; False: as in ADM
            max_pixels=178_956_970,  # an image with more is not decoded
            # Images that cannot be read are left out, up to so many. 0: the first one ends
            # the job.
            skip_broken=0,
            batch_size=64,  # images that a process encodes at once, over its devices
            # Records in a file. An interruption loses at most so many in each process.
            shard_records=1024,
        )
    )

    # The training loop.
    config.train = ConfigDict(
        dict(
            batch_size=256,  # images a step, over all devices
            steps=400_000,  # in total: a resumed run counts from its first start
            label_dropout=0.1,  # share of labels replaced by the null class
            # Min-SNR (Hang et al. 2023): where the signal-to-noise ratio is above it, mse and
            # kd_noise count gamma / ratio. 5 in the paper; a small one teaches what a picture holds
            # before its edges. 0: all timesteps count alike, as in DiT.
            min_snr_gamma=0.0,
            # Of the variational bound, which trains the predicted variance, beside mse. With a
            # small gamma the bound would be most of the loss.
            vb_weight=1.0,
            accumulation=1,  # microbatches a step
            remat="dots",  # none, dots or full: what the backward pass recomputes
            log_every=100,  # steps between log lines
            preview_every=10_000,  # steps between preview grids; 0: no previews
            preview_images=8,  # images in a row of the preview grid
            # Seconds in which no step ends, after which the stacks of all threads are printed;
            # 0: never.
            watchdog=900.0,
            # The run stops after this many steps in a row whose loss or gradient is not finite.
            stop_after_bad_steps=10,
            # First and last step of a profiler trace in workdir/profile; (): no trace.
            profile=(),
        )
    )

    # AdamW and its learning rate.
    config.optimizer = ConfigDict(
        dict(
            name="adamw",  # adamw, or came: PixArt-Sigma's, which needs 12 steps of warm-up or more
            learning_rate=1e-4,
            # Times that for what the student inherited as a whole; 1: one rate for all.
            inherited_rate=1.0,
            # Times that for a text encoder that is trained with the model (family pixart_t5).
            text_rate=1.0,
            b1=0.9,  # decay of the mean gradient (came: of the mean update)
            b2=0.999,  # and of its square
            b3=0.9999,  # came: of the updates' squared distance from their mean
            epsilon=1e-8,  # adamw; 1e-10 where clip_norm is 0.01
            weight_decay=0.0,
            clip_norm=0.0,  # largest norm of the whole gradient; 0: no clipping
            schedule="constant",  # constant, or cosine to zero at train.steps
            warmup=0,  # steps of linear warm-up
        )
    )

    # The moving average of the parameters, which is sampled and evaluated.
    config.ema = ConfigDict(
        dict(
            decay=0.9999,  # a step
            warmup=False,  # decay is min(decay, (1 + step) / (10 + step)): for short runs
        )
    )

    # Devices and processes.
    config.mesh = ConfigDict(
        dict(
            data=-1,  # replicas of the parameters; -1: all devices that fsdp leaves
            fsdp=1,  # devices that share one copy of parameters and optimizer state
            cpu_devices=0,  # on a CPU: devices it pretends to be, one a core; 0: JAX decides
            join_timeout=300,  # seconds that the start waits for every process to join
            heartbeat=100,  # seconds of silence after which a process counts as gone
        )
    )

    # Checkpoints of training.
    config.checkpoint = ConfigDict(
        dict(
            every=5_000,  # steps between checkpoints
            keep=3,  # number of newest checkpoints that are kept
            keep_every=100_000,  # steps between checkpoints that are kept for good; 0: none
            # True: go on from a checkpoint although fields that decide the result have changed.
            force_config=False,
        )
    )

    # The text encoder, for models that are told a caption.
    config.text = ConfigDict(
        dict(
            # A pipeline's folder with text_encoder/ and tokenizer/, or the folder of a T5.
            # Empty: there is none.
            checkpoint="",
            tokenizer="",  # a spiece.model, or its folder; empty: the one in text.checkpoint
            # What is done to a prompt: none (PixArt-Sigma's training), lower, or clean (as
            # diffusers does where it can). Features of another cleaning are refused.
            cleaning="none",
            max_length=300,  # tokens, the end of the text among them; longer prompts are cut
            batch_size=16,  # prompts at once, over all devices
            dtype="bfloat16",  # of parameters and features: bfloat16 or float32
            # Training: the probability of an image's first caption; its others share the rest.
            caption_ratio=0.5,
        )
    )

    # The sampler, and --mode=sample.
    config.sample = ConfigDict(
        dict(
            checkpoint="",  # what --mode=sample reads; empty: the workdir
            # ddpm, ddim or dpm++; for model.prediction=velocity euler, heun, or euler_maruyama, the
            # sampler of SiT's published scores.
            sampler="ddpm",
            steps=250,  # model evaluations an image; heun's are two a step
            # Timesteps: respaced, leading, trailing, linspace or time_uniform (PixArt's).
            # Empty: the sampler's default.
            spacing="",
            # Variance of ddpm's noise: learned_range, fixed_small or fixed_large.
            # Empty: learned_range, or fixed_large if the model has no variance head.
            variance="",
            eta=0.0,  # ddim's noise; 0: none, 1: as much as ddpm's
            order=2,  # order of dpm++, 1 to 3
            num_images=64,
            batch_size=64,  # images at once, over all devices
            cfg_scale=1.5,  # strength of guidance; 1: no guidance
            cfg_channels="3",  # leading channels that are guided: 3 (as in DiT), or all
            # Guided where low <= t <= high: in training timesteps, or in [0, 1] for a velocity.
            cfg_interval=(0.0, 1000.0),
            # Which classes are drawn: random (DiT's protocol), balanced, a class by its number or
            # name, or a list of them, which follow each other.
            labels=ml_collections.FieldReference("random", field_type=object),
            # For models that are told a caption: what they are asked for, in brackets.
            prompts=(),
            # In place of prompts: a file of one prompt a line; or GenEval's metadata (.jsonl,
            # "geneval" for its own 553, "digit_scenes" for the 180 of that data set), whose images
            # go into the folders that its scorer reads.
            prompt_file="",
            # Height and width of the images in pixels; (): those of model.input_size.
            size=(),
            aspect="",  # in place of it: width:height such as 16:9, the nearest of the buckets
            images_per_prompt=1,  # image i is of prompt i // images_per_prompt
            # Which tokens the model sees of nothing: prompt (as many as the prompt has, as in
            # PixArt) or own (the one of the empty prompt, as in diffusers).
            null_mask="prompt",
            # True: all latents are drawn before the first is decoded, which has the model's memory.
            # The text encoder is gone in any case when the model comes.
            offload=False,
            clip_denoised=False,  # clip the predicted image to [-1, 1]: for pixels
            # --mode=sample, export and demo: none, the blocks' weights in int8 (int8_weights), or
            # their activations too (int8). It needs qwix (docs/low_precision.md).
            quantize="none",
        )
    )

    # --mode=port: a checkpoint of any layout into another (docs/porting.md).
    config.port = ConfigDict(
        dict(
            source="",  # .pt, .safetensors, .ckpt, a diffusers or Orbax folder, or a workdir
            target="",  # .pt, .safetensors or a new folder
            # orbax, dit or diffusers; empty: dit for a file, orbax for a folder. A LiT for
            # diffusers is a pipeline that draws as `sample` says; so is a PixArt, with what `text`
            # and `autoencoder` name.
            layout="",
            weights="ema",  # ema or model, where a training checkpoint has both
            # For a checkpoint that does not tell its heads.
            # 0: what it tells, or the published number of its size.
            num_heads=0,
            num_classes=0,  # resize the label table to so many classes; 0: keep it
            # Of a PixArt: the features of "", as .npy, .safetensors or .pth, or a pipeline's folder
            # whose text encoder makes them. Empty: its own, or else text.checkpoint makes them.
            null_caption="",
            # Recompute the position table for this size, or (height, width); 0: keep it.
            input_size=ml_collections.FieldReference(0, field_type=object),
            # Of an autoencoder whose checkpoint does not tell it; 0: what the checkpoint tells.
            scaling_factor=0.0,
            # None: as the code that the checkpoint was written for computes.
            timestep_freq_shift=ml_collections.config_dict.placeholder(int),
            # None: likewise.
            mlp_norm_epsilon=ml_collections.config_dict.placeholder(float),
            # What a bare file of weights was trained to predict: noise (DiT) or velocity (SiT).
            # None: what it tells (docs/porting.md).
            prediction=ml_collections.config_dict.placeholder(str),
            # The checkpoint must be of the model that config.model describes, or a teacher of it.
            check_model=True,
        )
    )

    # --mode=export: the sampler as a program that runs without lit_jax (docs/export.md).
    config.export = ConfigDict(
        dict(
            target="",  # a new folder; empty: export in the workdir
            platforms=("cpu", "tpu", "cuda"),  # any of these
            # True: the weights are constants of the program, up to 1.9 GB; False: a file beside it.
            weights_inside=False,
            batch_size=0,  # images of a call; 0: any number
        )
    )

    # --mode=demo: a web page where teacher and student draw (docs/demo.md).
    config.demo = ConfigDict(
        dict(
            host="127.0.0.1",  # this machine alone; 0.0.0.0: whoever reaches it
            port=7860,  # 0: one that is free
        )
    )

    # --mode=evaluate, and evaluation during training (docs/evaluation.md).
    config.evaluate = ConfigDict(
        dict(
            # Training: steps between evaluations of the EMA weights; 0: no evaluation.
            every=0,
            # Training: images that each of them draws, balanced over the classes.
            every_images=1_000,
            # efficientnet_lite0, inception_adm, inception_pytorch_fid or inception_clean.
            features="efficientnet_lite0",
            # File of Inception weights, .pth or .pickle; empty: the EfficientNet package's.
            weights="",
            samples="",  # npz or folder of images of one size; empty: workdir/samples.npz
            reference="",  # npz, folder of images, or DATASET:SPLIT of data.dir
            num_images=50_000,  # images scored, the first of the file or folder; 0: all
            batch_size=64,  # images through the network at once
            num_neighbour_images=10_000,  # most reference images for precision and recall
            neighbours=3,  # k of precision and recall
            split_size=5_000,  # images in a split of the Inception score
            self_check=False,  # compare the scores with those that ADM published
            compare=(),  # evaluation_*.json files: print them in one table and score nothing
            compare_across=("samples.cfg_scale",),  # protocol fields that may differ there
            # The result file of GenEval's scorer, or a folder of digit scenes, which is scored by
            # GenEval's rules: print the table, and score nothing else.
            geneval="",
        )
    )

    # --mode=layers: which layers bear the student's attention (docs/workbench.md).
    config.layers = ConfigDict(
        dict(
            num_batches=8,  # of train.batch_size images, each at a timestep of its own
            # Choose which layers keep softmax so that a forward pass at sample.size has at most
            # this share of the teacher's FLOPs; 0: choose none.
            flops_share=0.0,
        )
    )

    # --mode=benchmark: times on this machine, and estimates for a TPU.
    config.benchmark = ConfigDict(
        dict(
            # Any of attention, model, peers (one evaluation of DiT and LiT, and of their torch
            # modules), data, image, precision.
            what=("attention", "model"),
            pixels=(256, 512, 1024),  # image sizes, of latents whose cells are 8 pixels wide
            attention_tokens=32_768,  # B * T of a batch for attention alone
            model_tokens=16_384,  # B * T of a batch for a model, on each device
            repeats=10,  # times are medians over so many repeats of 10 calls
            topology="v5e:2x2",  # on a CPU: the TPU whose compiler estimates the kernels
        )
    )

    # --mode=plan: what the TPU compiler says of a slice, without one (docs/scaling.md).
    config.plan = ConfigDict(
        dict(
            topology="v5e:2x4",  # TPU slice: v4:2x2x2, v5e:16x16, v5p:4x4x4, v6e:4x4, tpu7x:2x2x1
            slices=1,  # how many such slices, joined by the data center's network
            # Any of distill (the step with a teacher), plain (the step without), sample.
            programs=("distill", "plain", "sample"),
            # Of images with captions: plan these buckets of aspects, such as ("16x16", "8x32").
            # Empty: model.input_size.
            buckets=(),
            # Search for the largest batch that fits even where the config's batch fits.
            largest_batch=False,
        )
    )

    # What a training run draws at its end, with student and teacher: report and samples.png.
    config.report = ConfigDict(
        dict(
            num_images=0,  # balanced over the classes, drawn as `sample` says; 0: no report
            # Fit a classifier on the pixels of real images, and let it read the drawn ones; those
            # of evaluate.every too.
            read_labels=False,
            # Digit scenes: find the digits in the drawn images, and score them by GenEval's rules.
            # Needs sample.prompt_file=digit_scenes.
            read_scenes=False,
        )
    )

    return config.lock()  # an experiment that misspells a field fails where it does
