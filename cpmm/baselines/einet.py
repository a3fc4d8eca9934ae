r"""An einsum network with Gaussian leaves (Peharz et al., ICML 2020): the deep mixture here.

Each replica cuts the M features along a balanced binary tree into 2^depth leaf regions. A leaf
region has I components, products of Gaussians of its features; a region p above it has K sums over
all pairs of its halves' components, and the replicas are mixed at the root:

.. math:: p_{pk}(x) = \sum_{ij} w_{pkij}\, p_{left(p), i}(x)\, p_{right(p), j}(x), \quad
    \sum_{ij} w_{pkij} = 1

Trees are balanced, so a level of all replicas is one tensor and one product of matrices. The
letters of this file beside N and M:

    B  replicas      P  regions of a level, in all replicas      Q  features of a leaf region
    I  components of a leaf region, or of each half of a region      K  sums of a region

Written here because nothing at hand fits: libcirkit is GPL, pyjuice needs Triton and thus a GPU,
and SPFlow's Einet takes torch's global generator, cuts images at random and has no floor of
variances.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from functools import partial
from itertools import count

import torch
from torch import Tensor, nn

from cpmm.trajectory import inverse_soft_floor, soft_floor

# Share of the uniform distribution in every sum's weights. None vanishes, so the pair of likeliest
# components, which the exponentials are taken relative to, never underflows.
SMOOTHING = 1e-6


class EinsumNetwork(nn.Module):
    """A density of points, trained by its own :meth:`loss`; starts at random.

    Args:
        n_features: M.
        image_shape: (channels, height, width): regions are cut across rows and columns in turn,
            the first replica's first across rows, the second's across columns, further ones' as
            drawn. None: features are dealt at random, anew in each replica.
        n_replicas: B.
        depth: Cuts between the root and a leaf region; 0 is a mixture of products of Gaussians.
        n_sums: K; the top region of a replica has one.
        n_leaves: I of the leaf regions.
        floor: Soft lower bound of the leaves' log-variance.
        generator: Source of the regions and the first weights, on the CPU.
        batch_size: Points that go through at a time without gradients; bounds memory.

    Attributes:
        index: Features of the leaf regions, replica by replica, M where there is none, (P, Q).
        mean: Means of the leaves, (B, M, I).
        raw_log_variance: Behind the soft floor, (B, M, I).
        logit: Logits of the sums' weights, (P, K, I * I) for each level from the leaves up.
        root_logit: Logits of the replicas, (B, 1); at depth 0 of their components, (B, I).

    Raises:
        ValueError: If a size is out of range or the image has not M pixels.
    """

    index: Tensor

    def __init__(
        self,
        n_features: int,
        image_shape: tuple[int, int, int] | None,
        n_replicas: int,
        depth: int,
        n_sums: int,
        n_leaves: int,
        floor: float,
        generator: torch.Generator,
        batch_size: int = 2048,
    ) -> None:
        super().__init__()
        _require_sizes(n_features, n_replicas, depth, n_sums=n_sums, n_leaves=n_leaves)
        if image_shape is not None and math.prod(image_shape) != n_features:
            raise ValueError(
                f"image_shape {tuple(image_shape)} has {math.prod(image_shape)} pixels: expected "
                f"n_features (M) = {n_features}, or None for a table"
            )
        self.n_features, self.n_replicas, self.depth = n_features, n_replicas, depth
        self.n_sums, self.n_leaves, self.floor = n_sums, n_leaves, floor
        self.batch_size = batch_size
        shape = n_features, image_shape, depth
        regions = [leaf_regions(*shape, replica, generator) for replica in range(n_replicas)]
        self.register_buffer("index", torch.cat(regions))

        def normal(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*size, generator=generator))

        self.mean = normal(n_replicas, n_features, n_leaves)
        start = torch.full_like(self.mean, max(0.0, floor + 0.1))
        self.raw_log_variance = nn.Parameter(inverse_soft_floor(start, floor))
        self.logit = nn.ParameterList(
            normal(*shape) for shape in _weight_shapes(n_replicas, depth, n_sums, n_leaves)
        )
        self.root_logit = nn.Parameter(torch.zeros(n_replicas, 1 if depth else n_leaves))

    @classmethod
    def of_size(
        cls,
        n_parameters: int,
        n_features: int,
        image_shape: tuple[int, int, int] | None,
        n_replicas: int,
        floor: float,
        generator: torch.Generator,
        depth: int | None = None,
    ) -> EinsumNetwork:
        """Make a network with about as many parameters as another model, see :func:`match_sizes`.

        Args:
            n_parameters: The most that it may have.
            n_features, image_shape, n_replicas, floor, generator: As for the class.
            depth: None takes :func:`usual_depth`.

        Raises:
            ValueError: If a size is out of range, or one component a region has more parameters.
        """
        depth = usual_depth(n_features) if depth is None else depth
        sizes = match_sizes(n_parameters, n_features, n_replicas, depth)
        return cls(n_features, image_shape, n_replicas, depth, *sizes, floor, generator)

    @property
    def n_parameters(self) -> int:
        """Numbers stored: means, log-variances and logits."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def log_variance(self) -> Tensor:
        """Of the leaves, (B, M, I)."""
        return soft_floor(self.raw_log_variance, self.floor)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of points, nats, (N,), in the wider of the types of ``x`` and the parameters.

        Without gradients the points go through in batches, so memory is bounded.

        Raises:
            ValueError: If ``x`` is not (N, M).
        """
        self._require_points(x)
        if torch.is_grad_enabled():
            return self._log_prob(x)
        return torch.cat([self._log_prob(part) for part in x.split(self.batch_size)])

    def loss(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Minus the mean log-density of points, (N, M), nats per dimension; nothing is drawn."""
        return -self.log_prob(x).mean() / self.n_features

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw points from the root down.

        Args:
            n: Number of points.
            generator: On the device of the network.

        Returns:
            (n, M), in the type of the parameters.
        """
        parts = torch.arange(n).split(self.batch_size)
        return torch.cat([self._sample(len(part), generator) for part in parts])

    @torch.no_grad()
    def initialize(
        self, x: Tensor, generator: torch.Generator, n_points: int = 4096, n_rounds: int = 5
    ) -> None:
        """Start from data, as a tree of hidden groups.

        k-means groups the points by the features of each region alone, into as many groups as the
        region has components. Groups give the leaves their means and variances, and how often a
        group of the whole meets a pair of its halves' groups gives the sums their weights.

        Args:
            x: Training points, (N, M), on the device of the network.
            generator: Source of every draw.
            n_points: Points that are looked at, drawn at random.
            n_rounds: Rounds of k-means.

        Raises:
            ValueError: If ``x`` is not (N, M), or has fewer points than a region has components.
        """
        self._require_points(x)
        most, n_points = max(self.n_leaves, self.n_sums), min(n_points, len(x))
        if n_points < most:
            raise ValueError(
                f"there are {n_points} points to start from, a region has up to {most} components: "
                "give more points, or lower n_leaves and n_sums"
            )
        chosen = torch.randperm(len(x), generator=generator, device=generator.device)[:n_points]
        chosen_x = x[chosen.to(x.device)].to(self.mean)
        columns, index = (
            nn.functional.pad(chosen_x, (0, 1)).T,
            self.index,
        )  # zero where there is none
        points = columns[index]  # (P, Q, N)
        group, centre = group_columns(points, self.n_leaves, generator, n_rounds)
        member = _members(group, self.n_leaves).double()  # (P, I, N)
        size = member.sum(2, keepdim=True)
        # One more point at the centre, with the variance of all: no group is empty or flat.
        points, centre = points.double().mT, centre.double()
        total, squares = member @ points, member @ points.square()  # (P, I, Q)
        mean = (total + centre) / (size + 1)
        spread = squares - 2 * mean * total + size * mean.square() + (mean - centre).square()
        spread = spread.clamp(min=0) + points.var(1, correction=0, keepdim=True)
        log_variance = (spread / (size + 1)).log().clamp(min=self.floor + 0.1)
        self._write_leaves(self.mean, mean)
        self._write_leaves(self.raw_log_variance, inverse_soft_floor(log_variance, self.floor))
        if not self.depth:
            self.root_logit.copy_((size.squeeze(2) + 1).log())
        for logit in self.logit:
            _, n_sums, n_pairs = logit.shape
            left, right = group.unflatten(0, (-1, 2)).unbind(1)
            pair = left * math.isqrt(n_pairs) + right  # (P, N)
            index = index.unflatten(0, (-1, 2)).flatten(1)
            group = torch.zeros_like(pair)
            if n_sums > 1:
                group, _ = group_columns(columns[index], n_sums, generator, n_rounds)
            # Ten more points for each sum, spread over all pairs, also those not seen.
            seen = columns.new_full((len(group), n_sums * n_pairs), 10 / n_pairs)
            seen.scatter_add_(1, group * n_pairs + pair, torch.ones_like(pair, dtype=seen.dtype))
            logit.copy_(seen.view_as(logit).log().log_softmax(2))

    def _log_prob(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, self.mean.dtype)
        # The expanded square of the leaves needs all its digits.
        with torch.autocast(x.device.type, enabled=False):
            value = self._leaf_log_prob(x.to(dtype))
            for logit in self.logit:
                value = _sum_products(value, _weights(logit.to(dtype)))
            root = self.root_logit.to(dtype).flatten().log_softmax(0)
            return (value.flatten(0, 1) + root.unsqueeze(1)).logsumexp(0)

    def _leaf_log_prob(self, x: Tensor) -> Tensor:
        """Log-density of points, (N, M), under the leaf regions' components, nats, (P, I, N)."""
        mean, log_variance = self.mean.to(x), self.log_variance.to(x)
        # Relative to the components' common centre, the expanded square loses few digits.
        centre = mean.mean(2, keepdim=True)
        precision, shifted = (-log_variance).exp(), mean - centre
        scaled = precision * shifted
        constant = scaled * shifted + log_variance + math.log(2 * math.pi)
        leaves = self._read_leaves(torch.cat([centre, precision, scaled, constant], 2))
        centre, *leaves = leaves.split([1, *[self.n_leaves] * 3], 2)
        precision, scaled, constant = (part.mT for part in leaves)  # (P, I, Q)
        # Points along the columns: products over few components run along memory.
        points = nn.functional.pad(x, (0, 1)).T[self.index] - centre  # (P, Q, N)
        distance = torch.baddbmm(precision @ points.square(), scaled, points, alpha=-2)
        return -0.5 * (distance + constant.sum(2, keepdim=True))

    def _sample(self, n: int, generator: torch.Generator) -> Tensor:
        n_top = self.root_logit.shape[1]
        root = self.root_logit.flatten().softmax(0)
        drawn = torch.multinomial(root, n, replacement=True, generator=generator).unsqueeze(1)
        replica, state = drawn // n_top, drawn % n_top  # (n, 1): the component of the top region
        for level, logit in enumerate(reversed(self.logit)):
            region = replica * 2**level + torch.arange(2**level, device=drawn.device)
            weight = _weights(logit)[region, state]  # (n, 2^level, pairs)
            pair = torch.multinomial(weight.flatten(0, 1), 1, generator=generator).view(n, -1, 1)
            n_half = math.isqrt(logit.shape[2])
            state = torch.cat([pair // n_half, pair % n_half], 2).flatten(1)
        # The leaf region of each feature, by replica.
        regions = self.index.view(self.n_replicas, -1)
        position = torch.arange(regions.shape[1], device=drawn.device).expand_as(regions)
        owner = regions.new_empty(self.n_replicas, self.n_features + 1)
        owner.scatter_(1, regions, position // self.index.shape[1])
        component = state.gather(1, owner[replica.squeeze(1), :-1])  # (n, M)
        feature = torch.arange(self.n_features, device=drawn.device)
        mean = self.mean[replica, feature, component]
        deviation = (0.5 * self.log_variance[replica, feature, component]).exp()
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        return mean + deviation * noise

    def _read_leaves(self, values: Tensor) -> Tensor:
        """Take what replicas have for features, (B, M, ...), to their regions, (P, Q, ...)."""
        padded = nn.functional.pad(values, (0, 0, 0, 1)).flatten(0, 1)
        first = torch.arange(self.n_replicas, device=self.index.device) * (self.n_features + 1)
        return padded[self.index + first.repeat_interleave(2**self.depth).unsqueeze(1)]

    def _write_leaves(self, parameter: nn.Parameter, values: Tensor) -> None:
        """Set a parameter, (B, M, I), from values by region, (P, I, Q)."""
        padded = parameter.new_empty(self.n_replicas, self.n_features + 1, self.n_leaves)
        place = self.index.view(self.n_replicas, -1, 1).expand(-1, -1, self.n_leaves)
        padded.scatter_(1, place, values.mT.reshape(place.shape).to(padded))
        parameter.copy_(padded[:, :-1])

    def _require_points(self, x: Tensor) -> None:
        if x.ndim != 2 or x.shape[1] != self.n_features:
            raise ValueError(
                f"x must be (N, {self.n_features}), the einsum network has {self.n_features} "
                f"features: got shape {tuple(x.shape)}"
            )


def leaf_regions(
    n_features: int,
    image_shape: tuple[int, int, int] | None,
    depth: int,
    replica: int,
    generator: torch.Generator,
) -> Tensor:
    """Cut the features in halves, again and again; sizes differ by one at most.

    Args:
        n_features: M.
        image_shape: (channels, height, width): pixels are cut across rows or columns. None:
            features are shuffled first.
        depth: Number of cuts.
        replica: Which one; replicas 0 and 1 take turns between rows and columns, others draw.
        generator: Source of the shuffle and those draws.

    Returns:
        Features of each leaf region, filled up with M, integers, (2^depth, Q); regions 2 p and 2 p
        + 1 of a level are the halves of region p of the level above.
    """
    pixels = torch.arange(n_features)
    if image_shape is None:
        regions = [torch.randperm(n_features, generator=generator)]
    else:
        image = pixels.view(image_shape)
        orders = [image.permute(axes).flatten() for axes in ((1, 2, 0), (2, 1, 0))]
        regions = [pixels]
    for level in range(depth):
        halves = []
        for region in regions:
            features = region
            if image_shape is not None:
                axis = (level + replica) % 2
                if replica > 1:
                    axis = int(torch.randint(2, (1,), generator=generator))
                features = orders[axis][torch.isin(orders[axis], region)]
            halves += features.tensor_split(2)
        regions = halves
    filled = torch.full((len(regions), -(-n_features // 2**depth)), n_features)
    for row, region in zip(filled, regions, strict=True):
        row[: len(region)] = region
    return filled


def group_columns(
    points: Tensor, n_groups: int, generator: torch.Generator, n_rounds: int
) -> tuple[Tensor, Tensor]:
    """k-means in several sets of points at once, from random points; groups may stay empty.

    Args:
        points: (P, Q, N) with N >= I.
        n_groups: I.
        generator: Source of the first centres.
        n_rounds: Assignments.

    Returns:
        Group of each point, (P, N), integers in [0, I), and centres, (P, I, Q).
    """
    n_sets, n_features, n = points.shape
    draws = torch.rand(n_sets, n, generator=generator, device=generator.device).to(points.device)
    first = draws.argsort(1)[:, :n_groups, None].expand(-1, -1, n_features)
    centre = points.mT.gather(1, first)
    for _ in range(n_rounds):
        group = (centre @ points - 0.5 * centre.square().sum(2, keepdim=True)).argmax(1)
        member = _members(group, n_groups).to(points)
        size = member.sum(2, keepdim=True)
        centre = torch.where(size > 0, member @ points.mT / size.clamp(min=1), centre)
    return group, centre


def usual_depth(n_features: int) -> int:
    """Depth with about M^(2/3) leaf regions: 64 of 12 pixels for MNIST, 16 of 4 for digits."""
    return round(2 / 3 * math.log2(n_features))


def match_sizes(n_parameters: int, n_features: int, n_replicas: int, depth: int) -> tuple[int, int]:
    """Choose the sizes of the largest network within a number of parameters.

    Args:
        n_parameters: The most that it may have.
        n_features: M.
        n_replicas: B.
        depth: Cuts between the root and a leaf region.

    Returns:
        ``n_sums`` and ``n_leaves``, neither more than twice the other where both count; below depth
        2 there are no sums but the top's, and ``n_sums`` is 1.

    Raises:
        ValueError: If a size is out of range, or even one component a region has more parameters.
    """
    _require_sizes(n_features, n_replicas, depth)
    size = partial(count_parameters, n_features, n_replicas, depth)
    if n_parameters < size(1, 1):
        raise ValueError(
            f"n_parameters is {n_parameters}: an einsum network with M = {n_features}, n_replicas "
            f"{n_replicas} and depth {depth} has {size(1, 1)} or more; raise it or lower those"
        )
    best = 1, 1
    for n_sums in count(1) if depth > 1 else (1,):
        choices = range(1, 2 * n_sums + 1 if depth > 1 else n_parameters)
        n_leaves = bisect_right(choices, n_parameters, key=partial(size, n_sums))
        if 2 * n_leaves < n_sums:
            break
        best = max(best, (n_sums, n_leaves), key=lambda sizes: size(*sizes))
    return best


def count_parameters(
    n_features: int, n_replicas: int, depth: int, n_sums: int, n_leaves: int
) -> int:
    """Numbers that a network of these sizes stores."""
    leaves = 2 * n_replicas * n_features * n_leaves
    weights = sum(math.prod(shape) for shape in _weight_shapes(n_replicas, depth, n_sums, n_leaves))
    return leaves + weights + n_replicas * (1 if depth else n_leaves)


def _weight_shapes(
    n_replicas: int, depth: int, n_sums: int, n_leaves: int
) -> list[tuple[int, int, int]]:
    """Regions, sums and pairs of each level, from the leaves to the top."""
    halves = [n_leaves, *[n_sums] * depth]  # components of each half
    levels = zip(reversed(range(depth)), halves, strict=False)
    return [(n_replicas * 2**level, n_sums if level else 1, n**2) for level, n in levels]


def _weights(logit: Tensor) -> Tensor:
    return (1 - SMOOTHING) * logit.softmax(-1) + SMOOTHING / logit.shape[-1]


def _sum_products(value: Tensor, weight: Tensor) -> Tensor:
    """Take one level by the log-einsum-exp trick, nats: (2 P, I, N), (P, K, I * I) to (P, K, N)."""
    pair = value.unflatten(0, (-1, 2))
    peak = pair.detach().amax(2, keepdim=True)  # it cancels, and so does its gradient
    # Halves whose square is subnormal are zero, for a CPU is many times slower over such numbers.
    # The likeliest pair has a weight of SMOOTHING / I^2 or more: they are below the last digit of
    # the sum.
    least = 0.5 * math.log(torch.finfo(value.dtype).tiny)
    left, right = nn.functional.threshold(pair - peak, least, -math.inf).exp().unbind(1)
    product = (left.unsqueeze(2) * right.unsqueeze(1)).flatten(1, 2)  # (P, I * I, N)
    return (weight @ product).log() + peak.sum(1)


def _members(group: Tensor, n_groups: int) -> Tensor:
    """Whether each point, (P, N), belongs to each group, (P, I, N)."""
    return group.unsqueeze(1) == torch.arange(n_groups, device=group.device).unsqueeze(1)


def _require_sizes(n_features: int, n_replicas: int, depth: int, **others: int) -> None:
    for name, size in {"n_features": n_features, "n_replicas": n_replicas, **others}.items():
        if size < 1:
            raise ValueError(f"{name} is {size}: expected 1 or more")
    deepest = n_features.bit_length() - 1
    if not 0 <= depth <= deepest:
        raise ValueError(
            f"depth is {depth}: expected 0 to {deepest}, so that each of the 2^depth leaf regions "
            f"has at least one of the {n_features} features"
        )
