"""What each tracker of `report_to` needs, so that what is missing is told before anything is loaded."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec

from sft.config.schema import TrainingKeys
from sft.errors import Problem, UserError

MODULES: dict[str, tuple[str, ...]] = {
    "azure_ml": ("azureml.core",),
    "comet_ml": ("comet_ml",),
    "mlflow": ("mlflow",),
    "neptune": ("neptune",),
    "tensorboard": ("tensorboard",),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
    "codecarbon": ("codecarbon",),
    "clearml": ("clearml",),
    "dagshub": ("dagshub", "mlflow"),
    "flyte": ("flytekit",),
    "dvclive": ("dvclive",),
    "swanlab": ("swanlab",),
    "kubeflow": (),
}
"""What upstream's callback of each tracker imports."""
_PACKAGES = {"azureml.core": "azureml-core", "comet_ml": "comet-ml"}  # others are called as their module is
_IN_ITS_PLACE = {"tensorboard": "tensorboardX"}
_VARIABLES = {"kubeflow": "KUBEFLOW_TRAINER_SERVER_URL", "dagshub": "MLFLOW_TRACKING_URI"}


def require_trackers(keys: TrainingKeys) -> None:
    """Checks that every tracker that was asked for by its name can start.

    Raises:
        UserError: a package is not installed, or an environment variable is not set; all of them at once.
    """
    if problems := list(_problems(keys)):
        raise UserError(*problems)


def _problems(keys: TrainingKeys) -> Iterator[Problem]:
    for name in [keys.report_to] if isinstance(keys.report_to, str) else keys.report_to:
        missing = [m for m in MODULES.get(name, ()) if not (_is_there(m) or _is_there(_IN_ITS_PLACE.get(m, m)))]
        if missing:
            packages = [_PACKAGES.get(module, module) for module in missing]
            hint = f"Install it: {sys.executable} -m pip install {' '.join(packages)}"
            yield keys.problem("report_to", f"{name} needs {' and '.join(packages)}, not installed here", hint)
        variable = _VARIABLES.get(name)
        if variable and variable not in os.environ:
            message = f"{name} needs the environment variable {variable}, which is not set"
            yield keys.problem("report_to", message, "Set it, or leave this tracker out.")


def _is_there(module: str) -> bool:
    """Whether a module can be imported; a folder without code, such as the `wandb` that runs leave behind, cannot."""
    try:
        spec = find_spec(module)
    except ModuleNotFoundError:  # the package around it is missing
        return False
    return spec is not None and spec.origin is not None
