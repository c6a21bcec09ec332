-- Nothing blocks a worker: its system calls, while the broker is refusing, silent, stopped and cut off.
local moonrabbit = require "moonrabbit"
local broker = require "support.broker"
local nginx = require "support.nginx"
local process = require "support.process"
local proxy = require "support.proxy"

local shell = nginx.shell

-- Where a worker may wait: for all its events at once. Everything else must be over at once.
local WAITS = { epoll_wait = true, epoll_pwait = true }
-- What would be waiting, or would be the wrong way to look a name up, to read a file, or to talk.
local FORBIDDEN = { "poll", "ppoll", "select", "pselect6", "nanosleep", "clock_nanosleep", "fsync", "fdatasync",
  "flock", "wait4", "getaddrinfo" }

describe("a worker #resty", function()
  if not broker.url then pending "AMQP_URL is not set" return end
  if nginx.missing() then pending(nginx.missing()) return end
  if shell "command -v strace" == "" then pending "strace is not installed" return end

  local server, line
  local script = nginx.here .. "/build/spec-blocking.lua"

  local function start(port, heartbeat, timeout)
    timeout = timeout or 0.3
    server = nginx.start {
      http = ([[
        lua_shared_dict numbers 1m;
        lua_shared_dict keys 1m;
        init_worker_by_lua_block {
          local rabbit = require "moonrabbit.resty"
          rabbit.start { uri = %q, reconnect = { first = 0.02, max = 0.1 }, connect_timeout = %g, timeout = %g,
            exit_timeout = 0.2, heartbeat = %d, metrics = "numbers" }
          rabbit.consume { queue = "spec-blocking", arguments = {}, handler = function(message) message:ack() end }
          rabbit.consume { app = %q }
        }
      ]]):format(broker.uri { host = "127.0.0.1", port = port }, timeout, timeout, heartbeat or 1, script),
      server = [[
        location /ping { return 200 "pong\n"; }
        location /metrics { content_by_lua_block { require "moonrabbit.resty.metrics".serve() } }
        location /readyz { content_by_lua_block { require "moonrabbit.resty.metrics".readyz() } }
        location /publish {
          content_by_lua_block {
            local rabbit = require "moonrabbit.resty"
            rabbit.publish_async("y", { routing_key = "spec-blocking-app", message_id = ngx.var.request_id })
            local ok, err = rabbit.publish("x", { routing_key = "spec-blocking" })
            ngx.status = ok and 202 or 503
            ngx.say(ok and "ok" or err.kind)
          }
          log_by_lua_block { require "moonrabbit.resty".publish_async("log", { routing_key = "spec-blocking" }) }
        }
      ]],
    }
    server:ready "/ping"
  end

  setup(function()
    local conn = broker.connect()
    broker.ok(broker.ok(conn:channel()):queue_declare "spec-blocking")
    broker.close_all()
    local file = assert(io.open(script, "w"))
    file:write [[
      local mr = require "moonrabbit"
      return mr.app {
        name = "spec-blocking-app", queues = { ["spec-blocking-app"] = {} },
        consumers = { { queue = "spec-blocking-app", timeout = 1, dedupe = mr.dedupe.shared { dict = "keys" },
          retry = mr.retry.constant { delay = 0.1, attempts = 3 },
          handler = function(message)
            mr.sleep(0.001)
            if message.message_id:find "^[0-3]" then error "again" end
          end } },
      }
    ]]
    file:close()
  end)

  after_each(function()
    if server then server:stop() end
    if line then line:stop() end
    server, line = nil, nil
  end)

  teardown(function()
    local channel = broker.ok(broker.connect():channel())
    for _, name in ipairs { "", "-app", "-app.dead" } do channel:queue_delete("spec-blocking" .. name) end
    channel:exchange_delete "spec-blocking-app.home"
    broker.close_all()
    os.remove(script)
  end)

  -- Traces the worker while requests come, for so long and until enough(answers' statuses, calls). Returns the statuses, how
  -- many pings were answered, and the calls.
  local function trace(seconds, enough)
    local file = server.prefix .. "/trace"
    local tracer = shell(("strace -f -T -o '%s' -p %d > '%s.err' 2>&1 & echo $!"):format(file,
      server:workers()[1], file))
    local statuses, pings = {}, { sent = 0, answered = 0 }
    moonrabbit.run(function()
      broker.eventually(function()
        server:request "/ping"
        return shell(("test -s '%s' && echo yes"):format(file)) == "yes"
      end, 10, "strace traces")
      local over, running = false, 0
      local function repeatedly(fn)
        running = running + 1
        moonrabbit.spawn(function()
          while not over do fn() end
          running = running - 1
        end)
      end
      for _ = 1, 4 do
        repeatedly(function()
          local _, status = server:request "/publish"
          statuses[status or 0] = (statuses[status or 0] or 0) + 1
        end)
      end
      repeatedly(function()
        server:request "/metrics"
        moonrabbit.sleep(0.05)
      end)
      repeatedly(function()
        pings.sent = pings.sent + 1
        if server:request "/ping" == "pong\n" then pings.answered = pings.answered + 1 end
        moonrabbit.sleep(0.005)
      end)
      moonrabbit.sleep(seconds)
      broker.eventually(function() return enough(statuses, process.slurp(file) or "") end, 30, "enough happens")
      over = true
      broker.eventually(function() return running == 0 end)
    end)
    os.execute("kill -INT " .. tracer)
    nginx.gone({ tonumber(tracer) }, 10)
    return statuses, pings, process.slurp(file)
  end

  -- What the worker did that could have held it up.
  local function suspicious(text)
    local found, connects = {}, 0
    for _, name in ipairs(FORBIDDEN) do
      local call = text:match("%f[%w]" .. name .. "%b()[^\n]*")
      if call then found[#found + 1] = call end
    end
    local blocking = {} -- descriptors of sockets without SOCK_NONBLOCK
    for call in text:gmatch "[^\n]+" do
      local name, fd = call:match "^%d+%s+(%w+)%((%d*)"
      local descriptor = call:match "= (%d+)"
      if name == "socket" then
        blocking[descriptor or ""] = not call:find "SOCK_NONBLOCK" or nil
      elseif name == "ioctl" and call:find "FIONBIO, %[1%]" then
        blocking[fd] = nil
      elseif name == "connect" then
        connects = connects + 1
        if blocking[fd] then found[#found + 1] = call end
      elseif name == "open" or name == "openat" then
        found[#found + 1] = call
      elseif name and not WAITS[name] and call:find "<unfinished" then
        found[#found + 1] = call
      end
    end
    return found, connects
  end

  local function check(text, pings)
    local found, connects = suspicious(text)
    assert.same({}, found)
    assert.truthy(text:find "epoll_wait", text)
    assert.equal(pings.sent, pings.answered)
    return connects
  end

  local function refused(statuses) return statuses[503] end

  local function refused_and_connects(statuses, text)
    return statuses[503] and select(2, text:gsub("connect%(", "")) >= 2
  end

  it("waits for nothing but its events while the broker works", function()
    local to = broker.parsed()
    start(to.port, 1, 10)
    broker.eventually(function() return select(2, server:request "/publish") == 202 end)
    local statuses, pings, text = trace(0.5, function(statuses) return (statuses[202] or 0) > 10 end)
    check(text, pings)
    assert.is_nil(statuses[503], server:log())
  end)

  -- How often an idle worker woke up in so many seconds.
  local function wakes(seconds)
    local file = server.prefix .. "/idle"
    local tracer = shell(("strace -f -o '%s' -p %d > '%s.err' 2>&1 & echo $!"):format(file, server:workers()[1], file))
    broker.eventually(function() return shell(("grep -c attached '%s.err'"):format(file)) ~= "0" end)
    moonrabbit.sleep(seconds)
    os.execute("kill -INT " .. tracer)
    nginx.gone({ tonumber(tracer) }, 10)
    local n = 0
    for call in io.open(file):read("*a"):gmatch "[^\n]+" do
      if call:find "epoll_wait" and call:find "= %d" then n = n + 1 end
    end
    return n
  end

  it("does not wake up when there is nothing to do", function()
    start(broker.parsed().port, 60, 10)
    broker.eventually(function() return select(2, server:request "/readyz") == 200 end, 20, "all is connected")
    assert.equal(202, (select(2, server:request "/publish")))
    -- Four connections: each would wake it every second if anything looked around.
    broker.eventually(function() return wakes(1.5) == 0 end, 30, "a second and a half without a system call")
  end)

  it("waits for nothing but its events while nobody listens", function()
    start(nginx.free_port())
    local statuses, pings, text = trace(0.7, refused_and_connects)
    assert.truthy(check(text, pings) >= 2)
    assert.truthy(statuses[503] and not statuses[202])
  end)

  it("waits for nothing but its events while the broker is silent", function()
    local to = broker.parsed()
    line = proxy.start(to.host, to.port)
    start(line.port)
    broker.eventually(function() return select(2, server:request "/publish") == 202 end)
    line.silent = true
    local statuses, pings, text = trace(0.9, refused)
    check(text, pings)
    assert.truthy(statuses[503] and not statuses[202])
  end)

  it("waits for nothing but its events while the broker is stopped", function()
    -- A process that listens and then stands still: its kernel takes connections and bytes, and nobody answers.
    local path = process.file [[
      local server = assert(require "moonrabbit.runtime.native".listen("127.0.0.1", 0))
      io.write(server:port(), "\n")
      io.flush()
      require "moonrabbit".sleep(60)
    ]]
    local stopped = process.start { path }
    finally(function()
      stopped:stop()
      os.remove(path)
    end)
    local port = broker.eventually(function() return tonumber((stopped:out():match "^(%d+)\n")) end)
    stopped:signal "STOP"
    start(port)
    local statuses, pings, text = trace(0.9, refused_and_connects)
    assert.truthy(check(text, pings) >= 2)
    assert.truthy(statuses[503] and not statuses[202])
  end)
end)
