"""Requests to an application without a socket."""

import asyncio
import json


async def call(app, path, data=b'', leaves=False):
  """(status, JSON or text) of one request, without a socket.

  A client that leaves is gone as soon as its request is sent.
  """
  coming = [{'type': 'http.request', 'body': data}]
  status, body = [], []

  async def receive():
    if coming:
      return coming.pop()
    if not leaves:
      await asyncio.Event().wait()
    return {'type': 'http.disconnect'}

  async def send(message):
    if message['type'] == 'http.response.start':
      status.append(message['status'])
    else:
      body.append(message['body'])

  scope = dict(type='http', http_version='1.1', scheme='http', path=path)
  scope |= dict(method='POST' if data else 'GET', query_string=b'')
  scope['headers'] = [(b'host', b'localhost')]
  scope['headers'] += [(b'content-type', b'application/json')]
  await app(scope, receive, send)
  out = b''.join(body).decode()
  return (*status, json.loads(out) if out.startswith('{') else out)
