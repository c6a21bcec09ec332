--- An HTTP to AMQP gateway: 202 when the broker has the message, and never before.
--
-- | answer | when |
-- | --- | --- |
-- | 202 | a queue has the message |
-- | 200 | the reply of a call |
-- | 404 | no such exchange, or no queue takes the message |
-- | 403 | the broker's user may not |
-- | 400, 405, 413 | the request's fault |
-- | 503, with Retry-After | the broker is away or refuses, or the queue of this worker is full: try again |
-- | 504 | no answer in time: the outcome is unknown, and trying again may make a duplicate (X-Message-Id tells) |
local rabbit = require "moonrabbit.resty"

local gateway = {}

local TIMEOUT = 2
local RETRY_AFTER = 1

local options = {
  uri = os.getenv "AMQP_URL" or "amqp://guest:guest@127.0.0.1/",
  name = "gateway",
  timeout = TIMEOUT,
  entries = 2000, -- requests that may wait in one worker
}

function gateway.check() rabbit.check(options) end

function gateway.start() rabbit.start(options) end

-- ---- Requests ---------------------------------------------------------------------------------------

local function refuse(status, text)
  ngx.status = status
  if status == 503 then ngx.header["Retry-After"] = RETRY_AFTER end
  ngx.header["Content-Type"] = "text/plain"
  ngx.say(text)
end

-- Headers of HTTP that are properties of AMQP.
local properties = {
  ["content-type"] = "content_type", ["content-encoding"] = "content_encoding", ["x-message-id"] = "message_id",
  ["x-correlation-id"] = "correlation_id", ["x-message-type"] = "type", ["x-expiration"] = "expiration",
}

-- X-Amqp-Tenant: a  ->  headers.tenant = "a"; and the trace goes with the message.
local function message_options()
  local opts = { headers = {}, message_id = ngx.var.request_id }
  for name, value in pairs(ngx.req.get_headers(100)) do
    if type(value) == "table" then value = table.concat(value, ", ") end
    local property, header = properties[name], name:match "^x%-amqp%-(.+)$"
    if property then
      if #value > 255 then return nil, name .. " is longer than 255 bytes" end
      opts[property] = value
    elseif header then
      opts.headers[header] = value
    elseif name == "traceparent" then
      opts.headers.traceparent = value
    end
  end
  if opts.expiration and not opts.expiration:find "^%d+$" then
    return nil, "x-expiration is no number of milliseconds"
  end
  return opts
end

-- The body and the message's options; nil where the answer has been given.
local function accept()
  if ngx.req.get_method() ~= "POST" then
    ngx.header["Allow"] = "POST"
    return refuse(405, "POST a message")
  end
  if #ngx.var.key > 255 or #(ngx.var.exchange or "") > 255 then
    return refuse(400, "the name is longer than 255 bytes")
  end
  local opts, problem = message_options()
  if not opts then return refuse(400, problem) end
  local body, err = rabbit.request_body()
  if not body then return refuse(413, tostring(err)) end
  return body, opts
end

-- What went wrong, in HTTP's words. An err.message names no secret, but it is the log's, not the world's.
local function explain(err)
  ngx.log(ngx.INFO, "gateway: ", tostring(err))
  if err.kind == "unroutable" then return refuse(404, "no queue takes it") end
  if err.kind == "channel" and err.code == 404 then return refuse(404, "no such exchange") end
  if err.kind == "channel" and err.code == 403 then return refuse(403, "not permitted") end
  if err.kind == "overflow" and not err.temporary then return refuse(413, "too large") end
  if err.kind == "timeout" then return refuse(504, "no answer in time: it may have been taken") end
  return refuse(503, "try again")
end

function gateway.publish()
  local body, opts = accept()
  if not body then return end
  opts.exchange, opts.routing_key = ngx.var.exchange, ngx.var.key
  local ok, err = rabbit.publish(body, opts)
  if not ok then return explain(err) end
  ngx.status = 202
  ngx.header["X-Message-Id"] = opts.message_id
  ngx.say "accepted"
end

function gateway.call()
  local body, opts = accept()
  if not body then return end
  opts.correlation_id, opts.exchange, opts.routing_key = nil, "", ngx.var.key
  local reply, err = rabbit.call(body, opts)
  if not reply then return explain(err) end
  ngx.header["Content-Type"] = reply.properties.content_type or "application/octet-stream"
  ngx.header["Content-Length"] = #reply.body
  ngx.print(reply.body)
end

function gateway.health()
  local stats = rabbit.stats()
  if stats.state ~= "open" then return refuse(503, "no connection to the broker") end
  ngx.say "ok"
end

return gateway
