"""Results for readers: text, labelled arrays, pictures, and a page."""
