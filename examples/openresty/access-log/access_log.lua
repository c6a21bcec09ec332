--- Ships a line of JSON for every request to the exchange "access". What finds the worker's queue full (the broker was
-- away for too long) is dropped and counted: `dropped` of /stats, which tells of the worker that answers.
local cjson = require "cjson.safe"
local rabbit = require "moonrabbit.resty"

local access_log = {}

-- Prepared once: a send costs what its body costs.
local route = rabbit.publisher { exchange = "access", routing_key = "nginx", content_type = "application/json" }

local function declare(conn)
  local channel, err = conn:channel()
  if not channel then return nil, err end
  local ok
  ok, err = channel:exchange_declare("access", { type = "topic", durable = true })
  if ok then ok, err = channel:queue_declare("access-log", { durable = true }) end
  if ok then ok, err = channel:queue_bind("access-log", "access", "#") end
  channel:close()
  return ok and true, err
end

function access_log.start()
  rabbit.start {
    uri = os.getenv "AMQP_URL" or "amqp://guest:guest@127.0.0.1/",
    name = "access log",
    entries = 50000, bytes = 32 * 1024 * 1024,
    setup = declare,
  }
end

function access_log.ship()
  local var = ngx.var
  route:send_async(cjson.encode {
    time = ngx.req.start_time(), client = var.remote_addr, method = var.request_method, uri = var.request_uri,
    status = ngx.status, bytes = tonumber(var.bytes_sent), seconds = tonumber(var.request_time),
    agent = var.http_user_agent, id = var.request_id,
  })
end

function access_log.stats()
  local stats = rabbit.stats()
  ngx.say(cjson.encode { confirmed = stats.confirmed, queued = stats.queued, dropped = stats.overflows })
end

return access_log
