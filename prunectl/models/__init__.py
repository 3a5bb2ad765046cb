"""Image classifiers by name: ours, torchvision's, timm's, or a user's own function.

Every one of ours is a named sequence that ends in average pool, flatten and one linear layer `fc`, with each ReLU a
module of its own that runs once per forward, so that a hook on its input sees one activation code. Importing this
package imports no torch."""

from prunectl.models.factory import build
from prunectl.models.inputs import InputSize, input_size
from prunectl.models.names import ModelName, models, resolve, torchvision_names

__all__ = ["InputSize", "ModelName", "build", "input_size", "models", "resolve", "torchvision_names"]
