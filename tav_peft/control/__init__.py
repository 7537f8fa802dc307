"""Steering with control maps: ControlNets and T2I-Adapters, frame by frame."""
