"""Bundles inside other libraries: transformers' generate() and pipelines, Optimum's command line. Imported when used."""
