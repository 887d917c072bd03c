"""What each layer sees: second moments of its input patches, and how much its outputs matter."""

from tdecomp.moments.accumulator import Accumulator, output_rows
from tdecomp.moments.collection import Moments
from tdecomp.moments.gradients import OutputGradients
from tdecomp.moments.layer import LayerMoments

__all__ = ["Accumulator", "LayerMoments", "Moments", "OutputGradients", "output_rows"]
