"""An OpenAI-compatible HTTP server on a serving engine; needs the extra `ds-inference[serve]`.

`schema` says what a request may hold, `answers` what is sent back, `app` is the ASGI application, `run` its process.
"""
