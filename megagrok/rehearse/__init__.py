"""The full-size job on a laptop: any rank's real training code on fake peers and fake tensors, weighed and counted."""

from megagrok.rehearse.rehearsal import Memory, Rehearsal, Traffic
from megagrok.rehearse.walk import rehearse

__all__ = ["Memory", "Rehearsal", "Traffic", "rehearse"]
