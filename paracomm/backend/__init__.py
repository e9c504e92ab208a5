"""The torch.distributed backend "paracomm": `init_process_group("paracomm")` needs nothing imported but torch."""

from paracomm.backend.create import create
from paracomm.backend.process_group import ProcessGroup

__all__ = ["ProcessGroup", "create"]
