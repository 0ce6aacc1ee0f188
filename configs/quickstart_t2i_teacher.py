"""A small PixArt and its text encoder, trained together from nothing on digit scenes.

    python launch/digit_scenes.py workdir/scenes
    python -m lit_jax.main --config=configs/quickstart_t2i_teacher.py
    python -m lit_jax.main --config=configs/quickstart_t2i_teacher.py --mode=port \\
        --config.port.source=workdir/quickstart_t2i_teacher --config.port.layout=diffusers \\
        --config.port.target=workdir/digit_scenes

The last one writes a pipeline's folder, tokenizer/, text_encoder/ and transformer/, such as the
shipped teacher of configs/quickstart_t2i.py. Scenes of coloured MNIST digits are composed as they
are read (lit_jax/data/digit_scenes.py).

Hardware and time: 75 images/s on two free cores. The shipped teacher saw about a million images
before these fields were found (lit_jax/assets/README.md); from nothing they were not run to their
end. Four things decide how soon captions are followed:

- The text encoder has a small rate of its own. T5's attention is not scaled by 1 / sqrt(H), so that
  Adam makes its logits large within hundreds of steps; then it attends to one token whatever the
  order of words is, and a caption is a bag of words.
- Min-SNR weighting with a gamma far below 1. What a caption decides, how many digits and where, is
  decided at the noisiest timesteps, which count least in the plain loss. With larger ones many
  pictures of one digit stayed black. train.vb_weight falls with it, or the variance's bound would
  be nine tenths of the loss.
- Captions that say where things are: digits are named in reading order, and half the captions of
  places name colours. Without these, pictures of two digits showed the same one twice.
- Two tasks of six need the order of words, and are drawn more often than the others.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.model.update(
        family="pixart_t5", size="Ti", patch_size=4, attention="softmax", input_size=32,
        in_channels=3, dtype="float32", num_classes=None, timestep_freq_shift=None,
        mlp_norm_epsilon=None,
    )  # fmt: skip
    with config.model.unlocked():
        config.model.cross_heads = 4
        config.model.caption_channels = 128
        config.model.caption_length = 20
        config.model.position_base = 8
        config.model.position_scale = 0.25
        # Of the text encoder; its width is caption_channels.
        config.model.text_vocab_size = 64
        config.model.text_depth = 2
        config.model.text_num_heads = 4
        config.model.text_head_width = 32
        config.model.text_mlp_width = 256
    config.student.init = "random"
    config.text.update(tokenizer="workdir/scenes/tokenizer", max_length=20, dtype="float32")
    config.data.update(name="digit_scenes", flip=False, num_threads=1, prefetch=4)
    config.train.update(
        batch_size=32, steps=40_000, min_snr_gamma=0.002, vb_weight=0.001, remat="none",
        log_every=50, preview_every=1000,
    )  # fmt: skip
    config.optimizer.update(
        text_rate=0.2, learning_rate=6e-4, clip_norm=1.0, schedule="cosine", warmup=500
    )
    config.ema.update(decay=0.999, warmup=True)
    config.mesh.cpu_devices = 2  # one a core: twice as fast as one device with two threads
    config.checkpoint.update(every=500, keep=2, keep_every=0)
    config.report.read_labels = False
    config.evaluate.every = 0
    config.sample.update(
        sampler="dpm++", steps=20, batch_size=40, cfg_scale=3.0, cfg_channels="all",
        clip_denoised=True,
        prompts=("a three", "a two and an eight", "three fours", "a red six",
                 "a zero left of a nine", "a green one and a blue seven", "four ones",
                 "a white five"),
    )  # fmt: skip
    return config
