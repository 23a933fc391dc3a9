"""The world of the next miniature, which is trained in stages; it takes the place of `miniature.world` when
its weights take the place of today's."""
