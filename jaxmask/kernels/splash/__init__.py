"""Splash attention for TPU: :func:`to_splash` makes it from a mask."""

from jaxmask.kernels.splash.attention import SplashAttention, to_splash

__all__ = ["SplashAttention", "to_splash"]
