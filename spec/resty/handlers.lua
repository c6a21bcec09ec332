-- What the locations of the spec's nginx run.
local moonrabbit = require "moonrabbit.resty"

local handlers = {}

local function check(value, err)
  if not value then error(tostring(err or "nil"), 2) end
  return value
end

local url = os.getenv "AMQP_URL"

--- Connects, publishes with confirms, consumes, calls, closes.
function handlers.work()
  local conn = check(moonrabbit.connect(url))
  local ch = check(conn:channel { confirm = true, prefetch = 50 })
  local queue = check(ch:queue_declare("", { exclusive = true })).queue
  check(ch:publish("first", { routing_key = queue, headers = { n = 1 } }))
  local sent, err = ch:publish("lost", { routing_key = "no-such-queue" })
  check(not sent and err.kind == "unroutable", "unroutable")
  for i = 1, 1000 do check(ch:publish_async("m" .. i, { routing_key = queue })) end
  check(ch:wait_for_confirms(10))
  local consumer = check(ch:consume(queue))
  local n = 0
  for message in consumer:messages() do
    n = n + 1
    if n == 1 then check(message.headers.n == 1, "headers") end
    check(message:ack())
    if n == 1001 then break end
  end
  check(consumer:cancel())
  check(check(ch:queue_declare(queue, { passive = true })).message_count == 0, "all acked")
  local handled = 0
  check(conn:consume(queue, { concurrency = 5 }, function(message)
    moonrabbit.sleep(0.001)
    message:ack()
    handled = handled + 1
  end))
  local threads = {}
  for i = 1, 20 do
    threads[i] = ngx.thread.spawn(function() check(ch:publish("t" .. i, { routing_key = queue })) end)
  end
  for i = 1, 20 do check(ngx.thread.wait(threads[i])) end
  while handled < 20 do moonrabbit.sleep(0.01) end
  local big = ("x"):rep(1000000)
  local other = check(ch:queue_declare("", { exclusive = true })).queue
  check(ch:publish(big, { routing_key = other }))
  check(check(ch:get(other)).body == big, "a large body")
  check(conn:close(5))
  check(conn:state() == "closed", "closed")
  check(not package.loaded["moonrabbit.net"], "moonrabbit.net is not loaded")
  ngx.say "ok"
end

--- Waits on a consumer; the worker must serve others meanwhile.
function handlers.slow()
  local conn = check(moonrabbit.connect(url))
  local ch = check(conn:channel())
  local queue = check(ch:queue_declare("", { exclusive = true })).queue
  local consumer = check(ch:consume(queue))
  local message, err = consumer:receive(1)
  check(not message and err.kind == "timeout", "timeout")
  check(conn:close(5))
  ngx.say "ok"
end

function handlers.ping()
  ngx.say "pong"
end

--- The errors of connecting.
function handlers.errors()
  local function kind(options)
    local conn, err = moonrabbit.connect(options)
    check(not conn, "connected")
    return err.kind
  end
  ngx.say(kind "amqp://127.0.0.1:1/")
  ngx.say(kind((url:gsub("://[^@]*@", "://guest:wrong@"))))
  ngx.say(kind((url:gsub("/[^/]*$", "/no-such-vhost"))))
  ngx.say(kind { uri = "amqp://127.0.0.1:" .. ngx.var.server_port .. "/", connect_timeout = 3 })
  ngx.say(select(2, pcall(moonrabbit.connect, { uri = "amqps://127.0.0.1:1/", tls = { ca = "/x" } })))
  ngx.say(select(2, pcall(require("moonrabbit").connect, url)))
end

--- The broker closes the connection: nothing keeps the request after that.
function handlers.closed()
  local conn = check(moonrabbit.connect(url))
  local ch = check(conn:channel())
  local _, err = ch:flow(false) -- 540
  check(err and err.code == 540, "540")
  ngx.say "ok"
end

--- A connection owned by a timer.
function handlers.timer()
  local result
  check(ngx.timer.at(0, function()
    local ok, err = pcall(function()
      local conn = check(moonrabbit.connect(url))
      local ch = check(conn:channel { confirm = true })
      local queue = check(ch:queue_declare("", { exclusive = true })).queue
      check(ch:publish("x", { routing_key = queue }))
      check(conn:close(5))
    end)
    result = ok and "ok" or tostring(err)
  end))
  while not result do ngx.sleep(0.01) end
  ngx.say(result)
end

return handlers
