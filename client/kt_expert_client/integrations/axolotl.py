"""axolotl's plug-in (axolotl 0.19, integrations/base.py): in its configuration

    plugins:
      - kt_expert_client.integrations.axolotl.KtExpertPlugin
    kt_expert_server: host:7443
    kt_expert_options: {tickets: inputs}

has every model that axolotl loads get its experts from that server. Options are those of RunOptions.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import fields
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from kt_expert_client.errors import InvalidRequest, UnsupportedModel
from kt_expert_client.options import RunOptions
from kt_expert_client.start import offload_experts

_log = logging.getLogger("kt_expert_client")
# axolotl's own ways to compute or quantise experts: they would replace what is on the server.
_CLASHES = (
    "experts_implementation",
    "use_scattermoe",
    "use_sonicmoe",
    "expert_backend",
    "quantize_moe_experts",
    "liger_glu_activation",
    "tiled_mlp",
)


class KtExpertArgs(BaseModel):  # type: ignore[misc]  # pydantic comes with axolotl
    """The keys, merged into axolotl's own."""

    kt_expert_server: str | None = None
    kt_expert_options: dict[str, Any] | None = None


class KtExpertPlugin(BasePlugin):  # type: ignore[misc]  # axolotl has no annotations
    """Offloads between axolotl's pre_model_load and post_model_build, and says so in the log."""

    def __init__(self) -> None:
        super().__init__()
        self._open = contextlib.ExitStack()

    def get_input_args(self) -> str:
        return "kt_expert_client.integrations.axolotl.KtExpertArgs"

    def pre_model_load(self, cfg: Any) -> None:
        """Raises InvalidRequest without a server or for an option there is not, UnsupportedModel for a setting that clashes."""
        self._open.close()  # of a load that failed
        server = cfg.get("kt_expert_server")
        if not server:
            raise InvalidRequest("axolotl's configuration lists KtExpertPlugin and gives no kt_expert_server: host:port")
        clashes = [name for name in _CLASHES if cfg.get(name)]
        if (cfg.get("expert_parallel_size") or 1) > 1:
            clashes.append("expert_parallel_size")
        if clashes:
            raise UnsupportedModel(f"{', '.join(clashes)} is for experts in this process; leave it out with kt_expert_server")
        self._open.enter_context(offload_experts(server, options_from(cfg.get("kt_expert_options"))))
        _log.warning("experts of the model that is loaded now are at %s", server)

    def post_model_build(self, cfg: Any, model: Any) -> None:
        del cfg, model
        self._open.close()

    def post_train_unload(self, cfg: Any) -> None:
        del cfg
        self._open.close()


def options_from(given: Any) -> RunOptions | None:
    """None where nothing is given: the environment decides then. Raises InvalidRequest for an option there is not."""
    if not given:
        return None
    settings = dict(given)
    known = [field.name for field in fields(RunOptions)]
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise InvalidRequest(f"kt_expert_options has {', '.join(unknown)}, expected some of {', '.join(known)}")
    return RunOptions(**settings)
