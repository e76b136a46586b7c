"""An HTTP server that answers questions in OpenAI's protocol: what is asked, batches of questions, the application."""
