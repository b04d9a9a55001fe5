"""A folder for each page of the browser, which the server finds by itself."""
