-- What the nginx of bench/nginx runs.
local rabbit = require "moonrabbit.resty"

local handlers = {}

local QUEUE = "bench-200"
local route = rabbit.publisher { routing_key = QUEUE }
local body = ("x"):rep(200)
local url = os.getenv "AMQP_URL"

function handlers.start()
  rabbit.start {
    uri = url,
    setup = function(conn)
      local channel = assert(conn:channel())
      assert(channel:queue_declare(QUEUE, { durable = true }))
      return channel:close()
    end,
  }
end

function handlers.publish()
  local ok, err = rabbit.publish(body, { routing_key = QUEUE, message_id = ngx.var.request_id })
  ngx.status = ok and 202 or 503
  ngx.say(ok and "accepted" or tostring(err))
end

local line = ('{"client":"127.0.0.1","method":"GET","uri":"/logged","status":202,"agent":"%s"}'):format(("x"):rep(120))

function handlers.log() route:send_async(line) end

function handlers.redis()
  local redis = require "nginx.redis"
  local client = redis:new()
  client:set_timeouts(1000, 1000, 1000)
  assert(client:connect("127.0.0.1", tonumber(os.getenv "REDIS_PORT")))
  local n, err = client:lpush("bench", body)
  client:set_keepalive(10000, 100)
  ngx.status = n and 202 or 503
  ngx.say(n and "accepted" or err)
end

-- Publishes n messages on a connection of its own, as bench/peers/moonrabbit.lua does, and answers how many seconds it
-- took until all were confirmed.
function handlers.pour()
  local n, text, half = tonumber(ngx.var.arg_n), ("x"):rep(tonumber(ngx.var.arg_size)), tonumber(ngx.var.arg_window) / 2
  local now = require "moonrabbit.runtime.resty".now
  local conn = assert(rabbit.connect(url))
  local channel = assert(conn:channel { confirm = true })
  local options = { routing_key = QUEUE }
  local sent, awaited, count = {}, {}, 0
  local began = now()
  for _ = 1, n do
    count = count + 1
    sent[count] = assert(channel:publish_async(text, options))
    if count == half then
      for i = 1, #awaited do assert(awaited[i]:wait(30)) end
      sent, awaited, count = awaited, sent, 0
    end
  end
  for i = 1, #awaited do assert(awaited[i]:wait(30)) end
  for i = 1, count do assert(sent[i]:wait(30)) end
  ngx.say(now() - began)
  conn:close(5)
end

-- Puts n messages into the queue of the worker, and answers how many seconds it took until all were confirmed.
function handlers.flood()
  local n, text = tonumber(ngx.var.arg_n), ("x"):rep(tonumber(ngx.var.arg_size))
  local before = rabbit.stats().confirmed
  local now = require "moonrabbit.runtime.resty".now
  local began = now()
  for _ = 1, n do
    while not route:send_async(text) do ngx.sleep(0.001) end
  end
  while rabbit.stats().confirmed < before + n do ngx.sleep(0.001) end
  ngx.say(now() - began)
end

-- Consumes and acks n messages, and answers how many seconds it took.
function handlers.drink()
  local n, count = tonumber(ngx.var.arg_n), 0
  local now = require "moonrabbit.runtime.resty".now
  local conn = assert(rabbit.connect(url))
  local channel = assert(conn:channel { prefetch = 300 })
  local began = now()
  local consumer = assert(channel:consume("bench-" .. ngx.var.arg_size))
  for message in consumer:messages() do
    assert(#message.body > 0)
    message:ack()
    count = count + 1
    if count == n then break end
  end
  ngx.say(now() - began)
  conn:close(5)
end

function handlers.stats()
  local stats = rabbit.stats()
  stats.reason = nil
  ngx.say(require "cjson".encode(stats))
end

return handlers
