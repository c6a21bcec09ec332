--- A message on stdout: its bytes, or a line of JSON.

local json = require "moonrabbit.cli.json"
local output = require "moonrabbit.cli.output"

local messages = {}

--- The message as a table for JSON.
function messages.object(msg)
  local utf8 = json.is_utf8(msg.body)
  local object = {
    body = utf8 and msg.body or json.base64(msg.body), body_encoding = utf8 and "utf-8" or "base64",
    exchange = msg.exchange, routing_key = msg.routing_key, redelivered = msg.redelivered,
    delivery_tag = msg.delivery_tag, consumer_tag = msg.consumer_tag, message_count = msg.message_count,
  }
  local properties = {}
  for name, value in pairs(msg.properties or {}) do
    if name ~= "headers" then properties[name] = value end
  end
  if next(properties) ~= nil then object.properties = properties end
  local headers = msg.headers
  if headers and next(headers) ~= nil then object.headers = headers end
  return object
end

--- Writes it as the options ask: --json, --raw (the bytes and nothing else), else a line.
function messages.write(msg, args)
  if args.json then return output.write(json.encode(messages.object(msg)), "\n") end
  if args.raw then return output.write(msg.body) end
  return output.write(msg.body, "\n")
end

return messages
