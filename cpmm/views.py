"""Views: small random affine changes of images under which a point's class should stay."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

PART = 4096  # images warped at a time, which bounds the memory


@dataclass(frozen=True)
class AffineViews:
    """Random rotations, shears, changes of scale and shifts of grey-level images.

    Each amount is drawn for each image from the uniform distribution on [-a, a], with a the
    attribute of its name.

    Attributes:
        rotate: Degrees around the centre, at most 180.
        shear: Degrees along the rows, below 90.
        scale: Fraction of the size, below 1.
        translate: Pixels along each axis.
        image_shape: (channels, height, width).
    """

    rotate: float = 0.0
    shear: float = 0.0
    scale: float = 0.0
    translate: float = 0.0
    image_shape: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        """Raise ValueError if one is out of range, or there is no image."""
        for name, most in (("rotate", 180), ("shear", 89), ("scale", 0.99), ("translate", 1e6)):
            value = getattr(self, name)
            if not 0 <= value <= most:  # NaN is not
                raise ValueError(f"views.{name} is {value}: expected 0 to {most:g}")
        if self.image_shape is None:
            raise ValueError("views need images, this data set is a table")

    def __call__(self, raw: Tensor, generator: torch.Generator) -> Tensor:
        """Draw one view of each image.

        Args:
            raw: Whole grey levels, (N, M).
            generator: On the device of ``raw``.

        Returns:
            Whole grey levels of the same type, within the range of ``raw`` and 0, (N, M).

        Raises:
            ValueError: If ``raw`` holds real values, or images of another size.
        """
        assert self.image_shape is not None  # checked above
        most = raw.new_tensor(
            [self.rotate, self.shear, self.scale, self.translate, self.translate],
            dtype=torch.float32,
        )
        unit = torch.rand(len(raw), 5, generator=generator, device=raw.device)
        rotate, shear, scale, *shift = (most * (2 * unit - 1)).unbind(1)
        return warp_images(raw, self.image_shape, rotate, shear, scale, torch.stack(shift, 1))


def warp_images(
    raw: Tensor,
    image_shape: tuple[int, int, int],
    rotate: Tensor,
    shear: Tensor,
    scale: Tensor,
    translate: Tensor,
) -> Tensor:
    r"""Move the content of images, pixels between pixels by bilinear interpolation.

    With offsets p = (x, y) from the centre, in pixels to the right and down, content moves to

    .. math:: p' = (1 + \text{scale})
        \begin{pmatrix} \cos & \sin \\ -\sin & \cos \end{pmatrix}
        \begin{pmatrix} 1 & \tan \text{shear} \\ 0 & 1 \end{pmatrix} p + \text{translate}

    What comes from outside is background, level 0.

    Args:
        raw: Whole grey levels, (N, M).
        image_shape: (channels, height, width).
        rotate: Degrees anticlockwise, (N,).
        shear: Degrees, (N,).
        scale: Fraction of the size, (N,).
        translate: Pixels to the right and down, (N, 2).

    Returns:
        Rounded to whole levels, of the type of ``raw``, (N, M).

    Raises:
        ValueError: If ``raw`` holds real values, or images of another size.
    """
    channels, height, width = image_shape
    if raw.is_floating_point():
        raise ValueError(
            "views are of images with whole grey levels: got "
            f"{str(raw.dtype).removeprefix('torch.')}, real values of a table"
        )
    if raw.ndim != 2 or raw.shape[1] != channels * height * width:
        raise ValueError(
            f"views of {channels} x {height} x {width} images need (N, "
            f"{channels * height * width}): got shape {tuple(raw.shape)}"
        )
    angle, slope = rotate * (math.pi / 180), torch.tan(shear * (math.pi / 180))
    cos, sin, size = angle.cos(), angle.sin(), 1 + scale
    # Each pixel of the view looks up where it came from: the inverse of the map above.
    rows = [cos - slope * sin, -sin - slope * cos], [sin, cos]
    back = torch.stack([torch.stack(row, 1) for row in rows], 1) / size[:, None, None]  # (N, 2, 2)
    start = -(back @ translate.unsqueeze(-1))  # (N, 2, 1)
    half = back.new_tensor([width / 2, height / 2])  # affine_grid counts in halves of the image
    theta = torch.cat([back * half, start], 2) / half[:, None]  # (N, 2, 3)
    parts = []
    for image, part in zip(raw.split(PART), theta.split(PART), strict=True):
        image = image.unflatten(1, image_shape).float()  # noqa: PLW2901
        grid = affine_grid(part, list(image.shape), align_corners=False)
        parts.append(grid_sample(image, grid, align_corners=False).round().to(raw.dtype).flatten(1))
    return torch.cat(parts)
