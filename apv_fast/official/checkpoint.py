"""A pre-training checkpoint of the official implementation: three pickles, and the sizes that their arrays tell."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from apv_fast.config import ConfigError, ModelConfig
from apv_fast.official.pickles import read_arrays
from apv_fast.official.weights import our_layout, our_name
from apv_fast.run import CheckpointError

# A file is a tuple of arrays in the order of the layers' names, each layer's kernel, then its bias.
_GRU = ("gru.kernel", "gru.bias", "gru.norm.gamma", "gru.norm.beta")
_RSSM_LAYERS = ("img_dist_0", "img_in", "img_out_0", "obs_dist", "obs_out")
_CONVS = ("conv0", "conv1", "conv2", "conv3")
_OFFICIAL_LATENTS = {1024: 32}  # S·C → C: what all official presets have


def _variables(*layers: str) -> tuple[str, ...]:
    return tuple(f"{layer}.{kind}" for layer in layers for kind in ("kernel", "bias"))


CHECKPOINT = {
    "encoder": _variables(*_CONVS),
    "rssm": _GRU + _variables(*_RSSM_LAYERS),
    "decoder": _variables(*_CONVS, "convin"),
}


@dataclass(frozen=True)
class OfficialModel:
    """A pre-trained model in our terms."""

    sizes: ModelConfig
    state: dict[str, Tensor]  # of apv_fast.agent.VideoModel


def read_checkpoint(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of a pre-training checkpoint, float32, by their official names ``<part>.<variable>``.

    Raises:
        CheckpointError: a file is missing, damaged, or not of such a model; or the folder is of fine-tuning.
    """
    paths = {part: folder / f"{part}_variables.pkl" for part in CHECKPOINT}
    if (folder / "af_rssm_variables.pkl").exists():
        raise CheckpointError(
            folder,
            "af_rssm_variables.pkl",
            "this is a fine-tuning checkpoint, whose decoder reads the action-conditional model; only pre-trained "
            "video models can be imported: give the folder that it was fine-tuned from",
        )
    if missing := [path.name for path in paths.values() if not path.is_file()]:
        raise CheckpointError(
            folder, "files", f"{', '.join(missing)} not found; the official pre-training writes all three"
        )
    arrays: dict[str, np.ndarray] = {}
    for part, names in CHECKPOINT.items():
        values = read_arrays(paths[part])
        if len(values) != len(names):
            raise CheckpointError(
                paths[part], "arrays", f"there are {len(values)}; there must be {len(names)}: {', '.join(names)}"
            )
        for name, array in zip(names, values, strict=True):
            rank = 1 if not name.endswith("kernel") else 4 if name in _variables(*_CONVS) else 2
            if array.ndim != rank or 0 in array.shape:
                raise CheckpointError(paths[part], name, f"has shape {list(array.shape)}; it must have {rank} sizes")
            arrays[f"{part}.{name}"] = array
    return arrays


def read_model(folder: Path, discrete: int | None = None) -> OfficialModel:
    """Weights and sizes of a pre-training checkpoint.

    Args:
        folder: has ``encoder_variables.pkl``, ``rssm_variables.pkl`` and ``decoder_variables.pkl``.
        discrete: classes C of each latent; None: as in all official presets, where the sizes allow that.

    Raises:
        CheckpointError: see :func:`read_checkpoint`, or the arrays do not fit together.
        ConfigError: the number of classes is wrong, or cannot be told.
    """
    arrays = read_checkpoint(folder)
    sizes = _sizes(arrays, folder, discrete)
    state = {}
    for name, array in arrays.items():
        part, _, variable = name.partition(".")
        state[f"{part}.{our_name(variable)}"] = our_layout(array)
    return OfficialModel(sizes, state)


def _sizes(arrays: dict[str, np.ndarray], folder: Path, discrete: int | None) -> ModelConfig:
    """What the shapes say; whether all of them agree is checked when the weights are loaded."""
    depth = arrays["encoder.conv0.kernel"].shape[3]
    deter = len(arrays["rssm.gru.bias"]) // 3
    inputs, hidden = arrays["rssm.img_in.kernel"].shape
    latent = arrays["decoder.convin.kernel"].shape[0] - deter  # width of the stochastic part of the features
    statistics = len(arrays["rssm.obs_dist.bias"])
    if (channels := arrays["encoder.conv0.kernel"].shape[2]) != 3:
        raise CheckpointError(folder, "encoder", f"was trained on images with {channels} channels; they must have 3")
    if inputs < latent or statistics not in (latent, 2 * latent):
        raise CheckpointError(
            folder,
            "rssm",
            f"latents of width {latent} (as the decoder takes them) do not fit {statistics} statistics "
            f"and {inputs} inputs; are the files of one model?",
        )
    gaussian = statistics == 2 * latent
    classes = 0 if gaussian else _classes(latent, folder, discrete)
    if gaussian and discrete:
        raise ConfigError(f"discrete is {discrete}, but the latents in {folder} are Gaussian; leave it out")
    return ModelConfig(
        deter=deter,
        hidden=hidden,
        stoch=latent // (classes or 1),
        discrete=classes,
        action_pad=inputs - latent,
        cnn_depth=depth,
    )


def _classes(latent: int, folder: Path, discrete: int | None) -> int:
    """C of categorical latents, of which the arrays tell only S·C."""
    classes = discrete or _OFFICIAL_LATENTS.get(latent)
    if classes is None:
        raise ConfigError(
            f"discrete: the weights in {folder} tell that all latents together have {latent} classes, not how many "
            "each one has; say so with --discrete (rssm.discrete in the official config.yaml)"
        )
    if not isinstance(classes, int) or classes < 1 or latent % classes:
        raise ConfigError(f"discrete is {classes}; it must divide {latent}, the classes of all latents together")
    return classes
