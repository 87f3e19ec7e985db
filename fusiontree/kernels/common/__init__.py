"""What operators share: documents, shapes, chunks, packages."""
