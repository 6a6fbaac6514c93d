"""What a model gets wrong, what it is trained on, and what a run takes: the metrics of these."""

from __future__ import annotations

from simvq_moe.records.metric import Metric

ERRORS = (
    Metric(
        "val/mse",
        "MSE",
        "Mean squared error of reconstructed pixels, which lie between -1 and 1.",
        unit="squared error",
        better="lower",
        charts=("overview", "outcome"),
    ),
    Metric(
        "val/psnr",
        "PSNR (dB)",
        "Peak signal-to-noise ratio of an image, as the mean over images.",
        unit="dB",
        decimals=2,
        better="higher",
        charts=("overview",),
    ),
    Metric(
        "val/ssim",
        "SSIM",
        "Structural similarity of an image and its reconstruction, as the mean over images.",
        decimals=4,
        better="higher",
        charts=("overview",),
    ),
    Metric(
        "val/lpips",
        "LPIPS",
        "Perceptual distance of an image and its reconstruction, by VGG16; only `eval --lpips`.",
        better="lower",
    ),
    Metric(
        "val/rfid",
        "rFID",
        "Frechet distance of reconstructions from images, by InceptionV3; only `eval --rfid`.",
        better="lower",
    ),
    Metric(
        "val/mel_distance",
        "mel distance",
        "Mean absolute distance of log mel spectra of a clip and its reconstruction.",
        decimals=4,
        better="lower",
        charts=("overview",),
    ),
    Metric(
        "val/si_sdr",
        "SI-SDR (dB)",
        "Scale-invariant signal-to-distortion ratio of audible clips, as the mean over clips.",
        unit="dB",
        decimals=2,
        better="higher",
        charts=("overview",),
    ),
    Metric(
        "val/stoi",
        "STOI",
        "Short-time objective intelligibility of audible clips, where pystoi is installed.",
        decimals=3,
        better="higher",
    ),
    Metric(
        "val/pesq",
        "PESQ",
        "Perceptual evaluation of speech quality of audible clips, where pesq is installed.",
        decimals=2,
        better="higher",
    ),
    Metric(
        "val/bits_per_byte",
        "bits/byte",
        "Cross-entropy of the held-out text, divided by its bytes.",
        unit="bits a byte",
        decimals=4,
        better="lower",
        margin=0.005,
        charts=("overview", "outcome"),
    ),
    Metric(
        "val/bits_per_code",
        "bits/code",
        "Cross-entropy of the held-out codes of images or sound.",
        unit="bits a code",
        decimals=4,
        better="lower",
        charts=("overview",),
    ),
    Metric(
        "val/unigram_bits_per_code",
        "bits/code by frequency alone",
        "Cross-entropy of the held-out codes under how often each occurs in training, which is "
        "what a model knows that looks at nothing before.",
        unit="bits a code",
        decimals=4,
    ),
    Metric(
        "val/loss",
        "loss",
        "The held-out error of the task: cross-entropy of a token or code, the mean squared error "
        "of images, or the mel distance of sound; without the losses of routers and codebooks.",
        unit="nats, squared error or mel distance",
        decimals=4,
        better="lower",
        charts=("overview", "outcome"),
    ),
    Metric(
        "val/codes/effective_rank",
        "effective rank of the used codes",
        "Exponential of the entropy of the singular values of the codes that were drawn, about "
        "their mean.",
        unit="directions",
        decimals=1,
        charts=("curve",),
    ),
    Metric(
        "train/loss",
        "training loss",
        "The loss that is trained on, with all weighted terms, as the mean over the window.",
        unit="nats or squared error",
        decimals=4,
        better="lower",
        charts=("overview", "curve"),
        brief="loss {:.4g}",
    ),
)
"""What a model gets wrong, on the window of training or on the whole held-out set."""
LOSSES = (
    Metric(
        "train/cross_entropy", "training cross entropy", "Cross-entropy of a token.", unit="nats"
    ),
    Metric("train/mse", "training MSE", "Mean squared error of pixels.", better="lower"),
    Metric("train/l1", "training l1", "Mean absolute error of pixels."),
    Metric(
        "train/ssim",
        "training SSIM",
        "1 less the structural similarity.",
        decimals=4,
        better="lower",
    ),
    Metric("train/lpips", "training lpips", "Perceptual distance of images, by VGG16."),
    Metric("train/waveform_loss", "training waveform loss", "Mean absolute error of samples."),
    Metric("train/spectral_loss", "training spectral loss", "Distance of spectrograms."),
    Metric("train/mel_loss", "training mel loss", "Distance of log mel spectra."),
    Metric(
        "train/adversarial_loss",
        "training adversarial loss",
        "Loss of the tokenizer in the game with the discriminator.",
    ),
    Metric(
        "train/discriminator_loss",
        "training discriminator loss",
        "Loss of the discriminator, which no gradient leaves.",
    ),
    Metric(
        "train/adversarial_weight",
        "training adversarial weight",
        "Weight of the adversarial loss, which may adapt to the gradients.",
    ),
    Metric(
        "train/feature_loss",
        "training feature loss",
        "Distance of the discriminators' features of sound and of its reconstruction.",
    ),
    Metric(
        "train/codebook_loss",
        "training codebook loss",
        "Mean squared distance that pulls codes to latents.",
    ),
    Metric(
        "train/neighbour_loss",
        "training neighbour loss",
        "Mean squared distance that pulls codes which were not selected, by a soft assignment "
        "(NS-VQ).",
    ),
    Metric(
        "train/commitment_loss",
        "training commitment loss",
        "Mean squared distance that pulls latents to codes.",
    ),
    Metric(
        "train/index_loss",
        "training index loss",
        "Mean squared distance through both factors of an assignment (IBQ).",
    ),
    Metric(
        "train/token_entropy_loss",
        "training token entropy loss",
        "Entropy of a latent's probabilities of codes.",
        unit="nats",
    ),
    Metric(
        "train/codebook_entropy_loss",
        "training codebook entropy loss",
        "Entropy of the mean probabilities of codes.",
        unit="nats",
    ),
    Metric(
        "train/balance_loss",
        "training balance loss",
        "Load-balance loss of a layer, N sum f P (Switch), as the mean over layers; 1 is even.",
    ),
    Metric(
        "train/z_loss",
        "training z loss",
        "Mean squared logsumexp of a layer's logits, as the mean over layers.",
    ),
    Metric(
        "train/router_codebook_loss",
        "training router codebook loss",
        "Mean squared distance that pulls the chosen rows of a router to its inputs.",
    ),
    Metric(
        "train/router_commitment_loss",
        "training router commitment loss",
        "Mean squared distance that pulls a router's inputs to the chosen rows.",
    ),
    Metric(
        "train/latent_drift",
        "latent drift of a step",
        "Shift of the mean latent of the same held-out samples by the last step, over their root "
        "mean square distance from that mean.",
        decimals=4,
        charts=("curve",),
        log=True,
    ),
    Metric("train/grad_norm", "training grad norm", "Norm of the gradient before it is clipped."),
    Metric("train/lr", "training lr", "Learning rate of the last step."),
    Metric(
        "train/skipped_steps",
        "training skipped steps",
        "Steps that were left out so far, because a number in them was not finite.",
        unit="steps",
    ),
)
"""Terms of the training loss before their weights, as means over the window; size of steps."""
COSTS = (
    Metric("step", "step", "Optimizer steps that were done.", unit="steps"),
    Metric(
        "time", "time", "Seconds of training so far, without evaluations and records.", unit="s"
    ),
    Metric("time/step", "step", "Seconds of a step.", unit="s"),
    Metric("time/data", "data", "Seconds of a step that wait for data.", unit="s"),
    Metric("time/forward", "forward", "Seconds of a step in the forward pass.", unit="s"),
    Metric("time/backward", "backward", "Seconds of a step in the backward pass.", unit="s"),
    Metric("time/optimizer", "optimizer", "Seconds of a step in the optimizer.", unit="s"),
    Metric(
        "time/communication",
        "communication",
        "Seconds of a step that block in a collective, waiting for other ranks included.",
        unit="s",
    ),
    Metric(
        "time/wall_s",
        "wall (s)",
        "Seconds that the last process of the run took, evaluations included.",
        unit="s",
        decimals=1,
        better="lower",
        charts=("costs",),
    ),
    Metric(
        "time/train_s",
        "training (s)",
        "Seconds of training, without evaluations and records.",
        unit="s",
        decimals=1,
        better="lower",
        charts=("costs",),
    ),
    Metric(
        "speed/tokens_per_s",
        "tokens/s",
        "Tokens that all ranks together train on in a second.",
        unit="tokens/s",
        decimals=0,
        better="higher",
        charts=("overview", "costs"),
        brief="{:,.0f} tokens/s",
    ),
    Metric(
        "speed/mfu",
        "MFU",
        "Model FLOPs a second over the peak of all devices (PaLM), where that is known.",
        unit="share",
        decimals=1,
        better="higher",
    ),
    Metric(
        "parameters/total",
        "parameters",
        "Parameters of the model, from meta.json.",
        decimals=0,
        charts=("costs",),
    ),
    Metric(
        "parameters/trainable",
        "trainable",
        "Parameters that are trained, from meta.json.",
        decimals=0,
        charts=("costs",),
    ),
    Metric(
        "memory/peak_mib",
        "peak memory (MiB)",
        "Most memory that rank 0's process held, on its accelerator or in main memory.",
        unit="MiB",
        decimals=0,
        better="lower",
        charts=("costs",),
    ),
)
"""What a run takes."""
TASKS = (
    Metric(
        "eval/{task}/acc",
        "accuracy",
        "Share of examples whose right answer has the highest likelihood.",
        unit="share",
        decimals=1,
        better="higher",
    ),
    Metric(
        "eval/{task}/acc_norm",
        "normalized accuracy",
        "Share of examples whose right answer has the highest likelihood for its length.",
        unit="share",
        decimals=1,
        better="higher",
    ),
    Metric(
        "eval/{task}/exact_match",
        "exact match",
        "Share of examples whose answer is the right one to the letter.",
        unit="share",
        decimals=1,
        better="higher",
    ),
    Metric(
        "eval/{task}/bits_per_byte",
        "bits per byte",
        "Bits that a byte of the task's texts takes.",
        unit="bits",
        decimals=4,
        better="lower",
    ),
    Metric(
        "eval/{task}/byte_perplexity",
        "byte perplexity",
        "Perplexity of the bytes of the task's texts.",
        better="lower",
    ),
    Metric(
        "eval/{task}/word_perplexity",
        "word perplexity",
        "Perplexity of the words of the task's texts.",
        better="lower",
    ),
    Metric(
        "eval/{task}/{measure}",
        "measure of a task",
        "What lm-eval says of a task under a name that no entry above has.",
    ),
)
"""What tasks of lm-eval measure, `eval --tasks`."""
