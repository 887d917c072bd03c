"""Models larger than memory: folders of safetensors, read and written tensor by tensor."""
