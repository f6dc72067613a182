"""The codec that does nothing: latents are pixels. For tests and for runs before a real codec is at hand."""

from __future__ import annotations

from unspool.shapes import Latent, Pixels


class IdentityCodec:
    """Pixels `b f c y x` are the latents `b t c h w` themselves; one latent frame is one pixel frame, nothing is held
    back, and the stream's state is None."""

    temporal = 1
    spatial = 1

    def encode(self, pixels: Pixels) -> Latent:
        return pixels

    def decode(self, latents: Latent) -> Pixels:
        return latents

    def decode_stream(self, latents: Latent, state: None = None) -> tuple[Pixels, None]:
        """Pixels of the next latents, and the state to pass to the next call."""
        return latents, None
