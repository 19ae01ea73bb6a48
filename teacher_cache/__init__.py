"""Run a frozen vision teacher once over baked crops; keep its tokens and attention in a compressed zarr store."""
