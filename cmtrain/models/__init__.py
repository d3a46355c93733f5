"""Register the CMT models cmt_micro, cmt_ti, cmt_xs, cmt_s and cmt_b with timm."""

from cmtrain.models.checkpoints import load_reference_checkpoint, resize_positions, to_reference_state_dict
from cmtrain.models.cmt import CMT

__all__ = ["CMT", "load_reference_checkpoint", "resize_positions", "to_reference_state_dict"]
