"""HTTP/1.1 over plain or TLS sockets, no more of it than an object store needs (RFC 9110, RFC 9112)."""
