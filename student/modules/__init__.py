"""Everything with weights, and the losses."""
