"""An emulator of Google's object store, of PyPI's gcp-storage-emulator, as these tests need it."""

import http.server
import logging
import types

from gcp_storage_emulator.handlers import objects

_download = objects.download


def download(request, response, storage, *args, **kwargs):
    """Answer also with the generation, as the real store does: TensorStore needs it to write."""
    _download(request, response, storage, *args, **kwargs)
    if response.status.value < 300:
        place = (request.params["bucket_name"], request.params["object_id"])
        response["x-goog-generation"] = storage.get_file_obj(*place)["generation"]


objects.download = download  # before the server builds its table

from gcp_storage_emulator import server  # noqa: E402


class QuietServer(http.server.HTTPServer):
    def handle_error(self, request, client_address):
        """Say nothing of clients that hang up."""


server.server = types.SimpleNamespace(HTTPServer=QuietServer)


def start(port):
    """Serve gs://bucket in this process and return the server."""
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    running = server.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    running.start()
    return running
