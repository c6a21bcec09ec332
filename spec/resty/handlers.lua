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

--- Waits on a consumer in vain, and on another until a message comes; the worker must serve others meanwhile.
function handlers.slow()
  local conn = check(moonrabbit.connect(url))
  local ch = check(conn:channel())
  local consumer = check(ch:consume(check(ch:queue_declare("", { exclusive = true })).queue))
  local message, err = consumer:receive(0.05)
  check(not message and err.kind == "timeout", "timeout")
  check(check(check(ch:consume(ngx.var.arg_queue)):receive(20)):ack())
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

--- A connection of another handler: every call that waits says so.
function handlers.foreign()
  local shared, done
  check(ngx.timer.at(0, function()
    local conn = check(moonrabbit.connect(url))
    shared = conn
    while not done do ngx.sleep(0.01) end
    check(conn:close(5))
  end))
  while not shared do ngx.sleep(0.01) end
  local ok, err = pcall(shared.channel, shared)
  done = true
  check(not ok, "a foreign connection worked")
  ngx.say(err)
end

--- Cancelled tasks: in a sleep, on a condition, and while they read.
function handlers.cancelled()
  local runtime = require "moonrabbit.runtime.resty"
  local ended = {}
  local function start(name, fn)
    return runtime.spawn(function()
      local ok, err = pcall(fn)
      ended[name] = not ok and err == runtime.cancelled
    end)
  end
  local transport = check(runtime.open({ host = "127.0.0.1", port = tonumber(ngx.var.server_port) }, nil, 5))
  local started = runtime.now()
  local list = {
    start("sleep", function() runtime.sleep(60) end),
    start("wait", function() runtime.condition():wait() end),
    start("read", function() transport:read() end),
  }
  ngx.sleep(0.05)
  for _, task in ipairs(list) do runtime.cancel(task) end
  while not (ended.sleep ~= nil and ended.wait ~= nil and ended.read ~= nil) do
    check(runtime.now() - started < 10, "not cancelled")
    ngx.sleep(0.01)
  end
  check(ended.sleep and ended.wait and ended.read, "cancelled")
  local bytes, kind = transport:read(10, 0.01)
  check(not bytes and kind == "timeout", "timeout")
  transport:close()
  check(select(2, transport:read()) == "closed", "closed")
  ngx.say "ok"
end

--- The ways to write an address.
function handlers.addresses()
  local runtime = require "moonrabbit.runtime.resty"
  local port = tonumber(ngx.var.server_port)
  check(runtime.open({ host = "localhost", port = port }, nil, 5)):close()
  local function failure(endpoint)
    local transport, kind, text, temporary = runtime.open(endpoint, nil, 5)
    check(not transport, "connected")
    ngx.say(kind, " ", tostring(temporary), " ", text)
  end
  failure { host = "::1", port = 1 }
  failure { host = "localhost", port = 1 }
  failure { host = "broker.example", port = 5672 }
  failure { path = "/nowhere/amqp.sock" }
end

return handlers
