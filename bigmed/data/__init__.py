"""From files to host batches: schema, ingest, sources, pairs, pipeline, phantom."""
