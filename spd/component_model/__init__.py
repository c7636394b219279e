"""A frozen target whose chosen matrices can be replaced, call by call, by masked subcomponents."""

from spd.component_model.model import HALVES, ComponentModel, TargetOutput, in_half
from spd.component_model.places import layers_of
from spd.component_model.site import Site

__all__ = ["HALVES", "ComponentModel", "Site", "TargetOutput", "in_half", "layers_of"]
