"""What a model is given beside the text: frames of the clip, held until the next one given."""

from typing import Literal

from torch import Tensor

Condition = Literal["none", "first_frame", "first_last"]
CONDITIONS = ("none", "first_frame", "first_last")


def held_frames(condition: Condition, first: Tensor, last: Tensor, frames: int) -> Tensor:
    """Return the video [..., F, H, W] of the given frames first and last [..., H, W].

    first_frame holds the first for the whole clip; first_last holds it for half of it, then last.
    """
    video = first.unsqueeze(-3).repeat_interleave(frames, -3)
    if condition == "first_last":
        video[..., frames // 2 :, :, :] = last.unsqueeze(-3)
    return video
