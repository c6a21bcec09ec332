-- The life of a worker: before there is a broker, through lost connections, reloads, and its end.
local moonrabbit = require "moonrabbit"
local broker = require "support.broker"
local cjson = require "cjson.safe"
local dns_server = require "support.dns_server"
local fake = require "support.fake_broker"
local nginx = require "support.nginx"
local proxy = require "support.proxy"
local ok = broker.ok

local locations = [[
  location /ping { return 200 "pong\n"; }
  location /publish {
    lua_check_client_abort on;
    content_by_lua_block {
      local args = ngx.req.get_uri_args()
      local started = ngx.now()
      local ok, err = require "moonrabbit.resty".publish(args.body, { routing_key = args.queue,
        timeout = tonumber(args.timeout) })
      if not ok then ngx.status = 503 end
      ngx.say(ok and "ok" or err.kind .. " " .. tostring(err.temporary) .. " " .. err.message)
    }
  }
  location /body {
    content_by_lua_block {
      local rabbit = require "moonrabbit.resty"
      local ok, err = rabbit.publish(rabbit.request_body(), { routing_key = ngx.var.arg_queue,
        timeout = tonumber(ngx.var.arg_timeout) })
      ngx.say(ok and "ok" or err.kind .. " " .. err.message)
    }
  }
  location /timeouts {
    content_by_lua_block {
      local rabbit = require "moonrabbit.resty"
      local plain = rabbit.publisher { routing_key = "q" }
      local publisher = rabbit.publisher { routing_key = "q", timeout = 0.02 }
      for _, given in ipairs { { plain }, { publisher }, { publisher, { timeout = 0.01 } } } do
        local _, err = given[1]:send("x", given[2])
        ngx.say(err.message)
      end
    }
  }
  location /async {
    content_by_lua_block {
      local args = ngx.req.get_uri_args()
      local n = 0
      for i = 1, tonumber(args.n) do
        local ok, err = require "moonrabbit.resty".publish_async(args.body .. i, { routing_key = args.queue })
        if ok then n = n + 1 else ngx.ctx.err = err end
      end
      ngx.say(n, " ", ngx.ctx.err and ngx.ctx.err.kind or "ok")
    }
  }
  location /run {
    content_by_lua_block {
      local rabbit = require "moonrabbit.resty"
      local ran, err = rabbit.run(function(conn) return conn:state() end, tonumber(ngx.var.arg_timeout))
      ngx.say(ran or err.kind .. " " .. err.message)
    }
  }
  location /busy {
    content_by_lua_block {
      Freed = false
      for i = 1, 10 do
        ngx.timer.at(0, function()
          while not Freed and not ngx.worker.exiting() do ngx.sleep(0.01) end
        end)
      end
      ngx.sleep(0.05)
      ngx.say(ngx.timer.running_count())
    }
  }
  location /free { content_by_lua_block { Freed = true } }
  location /for_ever {
    content_by_lua_block {
      local rabbit = require "moonrabbit.resty"
      ngx.say(tostring(rabbit.publish("for ever", { routing_key = ngx.var.arg_queue, timeout = math.huge })), " ",
        tostring(rabbit.run(function() ngx.sleep(0.05) return "ran" end, math.huge)))
    }
  }
  location /late {
    content_by_lua_block {
      ngx.shared.late:set("here", true)
      while not ngx.worker.exiting() do ngx.sleep(0.01) end
      ngx.sleep(1.3) -- longer than exit_timeout
      local rabbit = require "moonrabbit.resty"
      local ok, err = rabbit.publish("late", { routing_key = ngx.var.arg_queue })
      ngx.sleep(0.6) -- the connection is closed again
      ngx.say(ok and "ok" or tostring(err), " ", tostring(rabbit.run(function(conn) return conn:state() end)))
    }
    log_by_lua_block {
      require "moonrabbit.resty".publish_async("logged", { routing_key = ngx.var.arg_queue })
    }
  }
  location /is_late { content_by_lua_block { ngx.print(tostring(ngx.shared.late:get "here")) } }
  location /timers {
    content_by_lua_block { ngx.say(Timers, " ", ngx.timer.running_count()) }
  }
  location /stats {
    content_by_lua_block {
      local stats = require "moonrabbit.resty".stats()
      stats.reason = stats.reason and tostring(stats.reason)
      ngx.say(require "cjson.safe".encode(stats))
    }
  }
]]

describe("a worker of nginx #resty", function()
  if not broker.url then pending "AMQP_URL is not set" return end
  if nginx.missing() then pending(nginx.missing()) return end

  local conn, channel, queue, server, line

  local function open_line(at)
    local to = broker.parsed()
    return proxy.start(to.host, to.port, at)
  end

  -- options: of start, as Lua text.
  local function start(port, options, what)
    what = what or {}
    what.http = (what.http_before or "") .. ([[
      init_worker_by_lua_block {
        require "moonrabbit.resty".start { uri = %q, reconnect = { first = 0.05, max = 0.2 }, %s }
      }]]):format(broker.uri { host = "127.0.0.1", port = port }, options or "")
    what.server = locations
    server = nginx.start(what):ready "/ping"
    return server
  end

  setup(function()
    conn = broker.connect()
    channel = ok(conn:channel { confirm = true })
    queue = broker.unique "life"
    ok(channel:queue_declare(queue, { durable = true }))
  end)

  before_each(function() ok(channel:queue_purge(queue)) end)

  after_each(function()
    if line then line:stop() end
    if server then server:stop() end
    line, server = nil, nil
  end)

  teardown(function()
    channel:queue_delete(queue)
    broker.close_all()
  end)

  local function stats() return cjson.decode((server:request "/stats") or "") or {} end

  local function publish(body, timeout)
    return server:request(("/publish?queue=%s&body=%s&timeout=%s"):format(queue, body, timeout or 10))
  end

  -- The bodies in the queue, with how often each came.
  local function taken()
    local seen, n = {}, 0
    while true do
      local message = ok(channel:get(queue, { no_ack = true }))
      if not message then return seen, n end
      if not seen[message.body] then n = n + 1 end
      seen[message.body] = (seen[message.body] or 0) + 1
    end
  end

  it("starts before the broker is there, and waits for it", function()
    local port = nginx.free_port()
    start(port, "entries = 10, timeout = 0.03")
    local body, status = publish("x", 0.2)
    assert.matches("^refused true there was no connection to the broker for 0.2 s: ", body)
    assert.equal(503, status)
    local timeouts = {}
    for seconds in (server:request "/timeouts"):gmatch "no connection to the broker for ([%d.]+) s" do
      timeouts[#timeouts + 1] = seconds
    end
    assert.same({ "0.03", "0.02", "0.01" }, timeouts)
    assert.equal("10 overflow\n", (server:request(("/async?n=12&body=a&queue=%s"):format(queue))))
    assert.equal(10, stats().queued)
    assert.equal(2, stats().overflows)
    assert.matches("^overflow true ", (publish "y"))
    assert.equal("connecting", stats().state)
    line = open_line(port)
    broker.eventually(function() return stats().confirmed == 10 end)
    assert.equal("ok\n", (publish "z"))
    local seen, n = taken()
    assert.equal(11, n)
    assert.equal(1, seen.z)
    assert.is_nil(seen.x)
  end)

  -- The waits that the log tells of, in seconds.
  local function waits(n)
    local list = {}
    broker.eventually(function()
      list = {}
      for seconds in server:log():gmatch "publishing: [^\n]*trying again in ([%d.]+) s" do
        list[#list + 1] = tonumber(seconds)
      end
      return #list >= n
    end, 20, n .. " attempts")
    return list
  end

  local function reconnecting(options, port)
    server = nginx.start {
      http = ([[init_worker_by_lua_block { require "moonrabbit.resty".start { uri = %q, %s } }]]):format(
        broker.uri { host = "127.0.0.1", port = port or nginx.free_port() }, options),
      server = locations,
    }
  end

  it("comes less and less often, up to a limit", function()
    reconnecting "reconnect = { first = 0.1, factor = 2, max = 0.6, jitter = 0 }"
    local list = waits(5)
    assert.same({ 0.1, 0.2, 0.4, 0.6, 0.6 }, { list[1], list[2], list[3], list[4], list[5] })
    server:stop()
    reconnecting "reconnect = { first = 0.5, factor = 1, jitter = 1 }"
    local varied = false
    for _, seconds in ipairs(waits(6)) do varied = varied or seconds ~= 0.5 end
    assert.is_true(varied)
  end)

  it("does so too when what is set up on each connection fails", function()
    reconnecting([[reconnect = { first = 0.1, factor = 2, max = 0.4, jitter = 0 }, setup = function(conn)
      Calls = (Calls or 0) + 1
      if Calls == 3 then error "thrown in setup" end
      local _, err = conn:channel():queue_declare("no-such-queue", { passive = true })
      return nil, err
    end]], broker.parsed().port)
    local list = waits(3)
    assert.same({ 0.1, 0.2, 0.4 }, { list[1], list[2], list[3] })
    server:logged "publishing: [^\n]*thrown in setup"
    server:logged "publishing: [^\n]*no queue 'no%-such%-queue'[^\n]*; trying again in 0.4 s"
  end)

  it("says at once what waiting does not help against", function()
    local to = broker.parsed()
    server = nginx.start {
      http = ([[init_worker_by_lua_block { require "moonrabbit.resty".start %q }]]):format(
        ("amqp://guest:wrong@%s:%d/"):format(to.host, to.port)),
      server = locations,
    }
    server:ready "/ping"
    assert.matches("^auth false ", (publish("x", 20)))
    -- Nobody waits for the next attempt either.
    local answer = publish("y", 2)
    assert.matches("^auth false ", answer)
    assert.is_nil(answer:find("there was no connection", 1, true))
    answer = server:request "/run?timeout=2"
    assert.matches("^auth ", answer)
    assert.is_nil(answer:find("there was no connection", 1, true))
    assert.equal(0, stats().timeouts)
    local seconds = tonumber(server:logged "trying again in ([%d.]+) s")
    assert.truthy(seconds > 7, seconds) -- as seldom as can be
    assert.is_nil(server:log():find("wrong", 1, true))
  end)

  it("sends again what a lost connection left unconfirmed", function()
    line = open_line()
    start(line.port)
    assert.equal("ok\n", (publish "before"))
    moonrabbit.run(function()
      local answers, n = {}, 0
      for i = 1, 200 do
        moonrabbit.spawn(function()
          if i > 100 then moonrabbit.sleep(0.002 * (i - 100)) end
          answers[i] = publish("m" .. i)
          n = n + 1
        end)
      end
      for _ = 1, 4 do
        moonrabbit.sleep(0.06)
        line:cut()
      end
      broker.eventually(function() return n == 200 end, 20)
      for i = 1, 200 do assert.equal("ok\n", answers[i], server:log()) end
    end)
    local seen = taken()
    for i = 1, 200 do assert.truthy(seen["m" .. i]) end
    assert.truthy(stats().sessions >= 2)
    assert.equal(0, stats().in_flight)
  end)

  it("comes back in a timer of its own each time", function()
    line = open_line()
    start(line.port, "", { http_before = [[
      init_by_lua_block {
        local at = ngx.timer.at
        Timers = 0
        function ngx.timer.at(...)
          Timers = Timers + 1
          return at(...)
        end
      }
    ]] })
    for i = 1, 10 do
      assert.equal("ok\n", (publish("m" .. i)))
      line:cut()
    end
    assert.equal("ok\n", (publish "last"))
    local sessions = stats().sessions
    assert.truthy(sessions >= 10, sessions)
    local all, now = (server:request "/timers"):match "^(%d+) (%d+)"
    assert.truthy(tonumber(all) >= sessions, all)
    assert.equal("1", now) -- those of lost connections have ended, and nginx has freed what they used
    assert.is_nil(server:log():find("has not run the timer", 1, true))
  end)

  local function connected() return select(2, server:log():gsub("publishing: connected to", "")) end

  it("comes back once after a stall in which the next attempt was due, and the wait for it over", function()
    line = open_line()
    reconnecting("reconnect = { first = 1, max = 1, jitter = 0 }", line.port)
    server:ready "/ping"
    assert.equal("ok\n", (publish "before"))
    assert.equal(1, connected())
    local pid = server:workers()[1]
    line:cut()
    server:logged "trying again in 1.0 s"
    os.execute("kill -STOP " .. pid)
    moonrabbit.sleep(2.5)
    os.execute("kill -CONT " .. pid)
    assert.equal("ok\n", (publish "after"))
    assert.is_nil(server:log():find("has not run the timer", 1, true), server:log())
    assert.equal(2, connected())
  end)

  it("waits a day and no longer, which is less than nginx can count", function()
    reconnecting("user = 'guest', password = 'wrong', reconnect = { first = 10, max = math.huge, jitter = 0 }",
      broker.parsed().port)
    server:logged "trying again in 86400.0 s"
    server:ready "/ping"
    assert.equal(1, #waits(1))
  end)

  -- One whose timers are taken when moonrabbit starts.
  local function start_busy(options)
    server = nginx.start {
      http = ([[
        lua_max_running_timers 3;
        init_worker_by_lua_block {
          for _ = 1, 3 do
            ngx.timer.at(0, function()
              while not Freed and not ngx.worker.exiting() do ngx.sleep(0.01) end
            end)
          end
          require "moonrabbit.resty".start { %s }
        }
      ]]):format(options),
      server = locations,
    }
    server:ready "/ping"
    server:logged "3 lua_max_running_timers are not enough"
  end

  it("begins by itself though nginx has forgotten its first timer", function()
    start_busy "uri = os.getenv 'AMQP_URL'"
    assert.equal("connecting", stats().state)
    server:request "/free"
    broker.eventually(function() return stats().state == "open" end, 15, "it is open")
  end)

  it("begins when it is needed though nginx has forgotten its first timers", function()
    start_busy "uri = os.getenv 'AMQP_URL'"
    broker.eventually(function()
      publish("x", 0.05)
      return server:log():find("publishing: nginx has not run the first timer (lua_max_running_timers", 1, true)
    end, 15, "it is started again")
    server:request "/free"
    broker.eventually(function() return publish("y", 0.3) == "ok\n" end, 15, "it is published")
    assert.equal(1, connected())
  end)

  it("comes back from a connection that was lost while it was full, and blocked", function()
    line = open_line()
    start(line.port, "bytes = 64 * 1024 * 1024")
    assert.equal("ok\n", (publish "before"))
    line.stuck = true
    -- More than the buffers of all sockets on the way take.
    assert.equal("5000 ok\n", (server:request(("/async?n=5000&queue=%s&body=%s"):format(queue, ("x"):rep(4000)))))
    local sent, looks = 0, 0
    broker.eventually(function()
      local before = sent
      sent = stats().in_flight
      looks = sent > 0 and sent == before and looks + 1 or 0
      return looks == 30
    end, 10, "nothing moves any more")
    line.lines[1]:write(fake.method(0, 10, 60, fake.short "low on memory"))
    broker.eventually(function() return publish("x", 0.02):find "^blocked" end)
    line.stuck = false
    line:cut()
    broker.eventually(function() return stats().sessions == 2 end)
    broker.eventually(function()
      local now = stats()
      return now.queued == 0 and now.in_flight == 0
    end, 20, "all is settled")
  end)

  it("holds messages while the broker is short of memory, and does nothing meanwhile", function()
    if not broker.name then return pending(broker.not_ours()) end
    start(broker.parsed().port)
    assert.equal("ok\n", (publish "before"))
    local function watermark(value) broker.ctl("set_vm_memory_high_watermark", value) end
    finally(function() watermark "0.4" end)
    watermark "0.00001"
    local function ticks()
      local file = assert(io.open(("/proc/%d/stat"):format(server:workers()[1])))
      local fields = file:read("*a"):match "%) (.*)"
      file:close()
      local user, system = fields:match(("%S+ "):rep(11) .. "(%d+) (%d+)")
      return user + system
    end
    -- The broker tells of it, and stops reading, once something is published.
    assert.matches("^timeout true ", (publish("unknown", 0.5)))
    local used = ticks()
    local answer = publish("held", 1.5)
    assert.matches("^blocked true the message was not sent within 1.5 s: the broker has blocked publishing", answer)
    assert.matches("low on memory", answer)
    assert.equal("20 ok\n", (server:request(("/async?n=20&body=a&queue=%s"):format(queue))))
    used = ticks() - used
    assert.truthy(used < 30, used) -- of 150
    watermark "0.4"
    broker.eventually(function() return stats().confirmed == 22 and stats().in_flight == 0 end)
    local seen = taken()
    for i = 1, 20 do assert.truthy(seen["a" .. i]) end
    assert.is_nil(seen.held)
  end)

  it("goes to another node at once when one has fallen silent", function()
    line = open_line()
    local other = broker.parsed()
    server = nginx.start {
      http = ([[init_worker_by_lua_block {
        require "moonrabbit.resty".start { endpoints = { %q, %q }, heartbeat = 1, reconnect = { first = 0.05 } }
      }]]):format(broker.uri { host = "127.0.0.1", port = line.port },
        broker.uri { host = other.host, port = other.port }),
      server = locations,
    }
    server:ready "/ping"
    assert.equal("ok\n", (publish "before"))
    assert.equal(2, #line.lines, "it is not at the first one")
    line.silent = true
    assert.equal("ok\n", (publish("after", 20)))
    assert.equal(2, #line.lines, "the silent one was asked again")
  end)

  it("comes back though nginx has run too many timers", function()
    line = open_line()
    start(line.port, "metrics = 'numbers'", { http_before = "lua_max_running_timers 3; lua_shared_dict numbers 1m;" })
    assert.equal("ok\n", (publish "before"))
    assert.equal("3\n", (server:request "/busy"))
    line:cut()
    server:logged "nginx has not run the timer of the next attempt %(lua_max_running_timers"
    assert.equal("ok\n", (publish "busy"))
    server:request "/free"
    broker.eventually(function() return ((server:request "/timers") or ""):find " 1\n" end, 10, "the others have ended")
    line:cut()
    assert.equal("ok\n", (publish "after"))
    broker.eventually(function() return ((server:request "/timers") or ""):find " 1\n" end, 10, "one timer is left")
    local pids = server:workers()
    server:signal "QUIT"
    nginx.gone(pids, 8)
  end)

  it("leaves though nginx has run too many timers to tell it so", function()
    start(broker.parsed().port, "heartbeat = 1", { http_before = "lua_max_running_timers 3;" })
    assert.equal("ok\n", (publish "before"))
    assert.equal("3\n", (server:request "/busy"))
    local pids = server:workers()
    server:signal "QUIT"
    server:logged "life.lua:%d+: 3 lua_max_running_timers are not enough"
    nginx.gone(pids, 8)
  end)

  it("waits for ever when it is told to", function()
    start(broker.parsed().port)
    assert.equal("true ran\n", (server:request("/for_ever?queue=" .. queue)), server:log())
    assert.equal(0, stats().timeouts)
  end)

  it("does not say that a message was not sent when it was, and the password is wrong since", function()
    line = open_line()
    server = nginx.start {
      http = ([[init_worker_by_lua_block {
        require "moonrabbit.resty".start { uri = "amqp://127.0.0.1:%d/", user = "guest", reconnect = { first = 0.05 },
          password = function()
            Asked = (Asked or 0) + 1
            return Asked == 1 and "guest" or "wrong"
          end }
      }]]):format(line.port),
      server = locations,
    }
    server:ready "/ping"
    assert.equal("ok\n", (publish "before"))
    line.silent = true
    moonrabbit.run(function()
      local answer
      moonrabbit.spawn(function() answer = publish("sent", 20) end)
      broker.eventually(function() return stats().in_flight == 1 end)
      line.silent = false
      line:cut()
      broker.eventually(function() return answer end)
      assert.matches("^timeout false [^\n]*outcome is unknown, and cannot be made again: ", answer)
    end)
    assert.matches("^auth false ", (publish("unsent", 20)))
  end)

  it("what it says was not sent does not come, when there is no room on the line", function()
    line = open_line()
    start(line.port, "max_buffer = 65536", { http_before = "client_max_body_size 1m; client_body_buffer_size 1m;" })
    assert.equal("ok\n", (publish "before"))
    line.stuck = true
    local answers, n = {}, 0
    moonrabbit.run(function()
      -- More than the buffers of all sockets on the way take.
      for i = 1, 200 do
        moonrabbit.spawn(function()
          answers[i] = server:request(("/body?queue=%s&timeout=0.5"):format(queue), { body = i .. ("x"):rep(100000) })
          n = n + 1
        end)
      end
      broker.eventually(function() return n == 200 end, 30)
      line.stuck = false
      broker.eventually(function()
        local now = stats()
        return now.in_flight == 0 and now.queued == 0 and now.bytes == 0
      end, 20, "all is settled")
    end)
    local seen, unknown, unsent = {}, 0, 0
    for body in pairs((taken())) do seen[body:match "^%d*"] = true end
    for i, answer in pairs(answers) do
      if answer:find("the message was not sent", 1, true) then
        unsent = unsent + 1
        assert.is_nil(seen[tostring(i)], i)
      elseif answer:find("outcome is unknown", 1, true) then
        unknown = unknown + 1
        assert.truthy(seen[tostring(i)], i)
      end
    end
    assert.truthy(unknown > 0 and unsent > 0, ("%d unknown, %d not sent"):format(unknown, unsent))
  end)

  it("has so many functions under way, and no more", function()
    local port = nginx.free_port()
    start(port, "calls = 2")
    moonrabbit.run(function()
      local answers, n = {}, 0
      for i = 1, 3 do
        moonrabbit.spawn(function()
          answers[i] = server:request "/run?timeout=3"
          n = n + 1
        end)
      end
      broker.eventually(function() return n == 3 end)
      table.sort(answers)
      assert.matches("^overflow 2 calls are under way in this worker", answers[1])
      for i = 2, 3 do assert.matches("^refused there was no connection to the broker for 3 s", answers[i]) end
      assert.equal(0, stats().calls)
      moonrabbit.spawn(function() answers.late = server:request "/run?timeout=10" end)
      broker.eventually(function() return stats().calls == 1 end)
      line = open_line(port)
      broker.eventually(function() return answers.late end)
      assert.equal("open\n", answers.late)
      assert.equal(0, stats().calls)
    end)
  end)

  it("says that an outcome is unknown when the broker is silent", function()
    line = open_line()
    start(line.port)
    assert.equal("ok\n", (publish "before"))
    line.silent = true
    assert.matches("^timeout true the broker has not confirmed the message within 0.3 s: its outcome is unknown",
      (publish("silent", 0.3)))
    assert.equal("pong\n", (server:request "/ping"))
    line.silent = false
    line:cut()
    assert.equal("ok\n", (publish "after"))
  end)

  it("publishes for a client that goes while the confirm is pending", function()
    line = open_line()
    start(line.port)
    assert.equal("ok\n", (publish "before"))
    line.silent = true
    server:request(("/publish?queue=%s&body=gone&timeout=10"):format(queue), { on = function(transport)
      broker.eventually(function() return stats().in_flight == 1 end)
      transport:close()
    end })
    server:logged "client prematurely closed connection"
    line.silent = false
    line:cut()
    broker.eventually(function() return stats().confirmed == 2 end)
    assert.equal("ok\n", (publish "after"))
    local seen = taken()
    assert.truthy(seen.gone)
    assert.equal(1, seen.after)
    assert.is_nil(server:log():find "%[error%]", server:log())
  end)

  -- Ways to go, once more and more has been accepted; each returns the processes that have to go.
  local ways = {
    ["it is reloaded"] = function(accepts)
      local old = {}
      for _ = 1, 3 do
        accepts(10)
        for _, pid in ipairs(server:reload()) do old[#old + 1] = pid end
      end
      return old
    end,
    ["its workers crash"] = function(accepts)
      local old = {}
      for _ = 1, 3 do
        accepts(10)
        local pid = server:workers()[1]
        os.execute("kill -KILL " .. pid)
        broker.eventually(function()
          local now = server:workers()
          return #now == 2 and now[1] ~= pid and now[2] ~= pid
        end, 10, "another in its place")
        old[#old + 1] = pid
      end
      return old
    end,
    ["it quits"] = function(accepts)
      accepts(20)
      local old = server:workers()
      server:signal "QUIT"
      return old
    end,
    ["it is stopped"] = function(accepts)
      accepts(20)
      local old = server:workers()
      server:signal "TERM"
      return old
    end,
  }

  for name, go in pairs(ways) do
    it("loses nothing that was confirmed when, under load, " .. name, function()
      start(broker.parsed().port, "", { workers = 2 })
      local old
      moonrabbit.run(function()
        local accepted, failed, running, n = {}, {}, 8, 0
        local over = false
        for _ = 1, running do
          moonrabbit.spawn(function()
            while not over do
              n = n + 1
              local body = "m" .. n
              local answer, status = publish(body)
              if answer == "ok\n" then
                accepted[#accepted + 1] = body
              elseif status then -- a connection that nginx closed has promised nothing
                failed[#failed + 1] = answer
              else
                moonrabbit.sleep(0.01)
              end
            end
            running = running - 1
          end)
        end
        old = go(function(more)
          local enough = #accepted + more
          broker.eventually(function() return #accepted >= enough end, 20, more .. " more are accepted")
        end)
        moonrabbit.sleep(0.1)
        over = true
        broker.eventually(function() return running == 0 end)
        assert.same({}, failed, server:log())
        nginx.gone(old, 8)
        local seen = taken()
        for _, body in ipairs(accepted) do assert.truthy(seen[body], body) end
      end)
    end)
  end

  it("flushes what is queued when it quits", function()
    line = open_line()
    start(line.port, "linger = 60, exit_timeout = 60")
    assert.equal("ok\n", (publish "before"))
    assert.equal("300 ok\n", (server:request(("/async?n=300&body=a&queue=%s"):format(queue))))
    local pids = server:workers()
    server:signal "QUIT"
    nginx.gone(pids, 10)
    local _, n = taken()
    assert.equal(301, n)
  end)

  it("still publishes for a request that outlives the reload", function()
    start(broker.parsed().port, "exit_timeout = 1", { http_before = "lua_shared_dict late 1m;" })
    assert.equal("ok\n", (publish "before"))
    moonrabbit.run(function()
      local answer
      moonrabbit.spawn(function() answer = server:request("/late?queue=" .. queue) end)
      broker.eventually(function() return server:request "/is_late" == "true" end)
      local old = server:reload()
      broker.eventually(function() return answer end)
      assert.equal("ok open\n", answer, server:log())
      nginx.gone(old, 8)
    end)
    local seen = taken()
    assert.equal(1, seen.late)
    assert.equal(1, seen.logged)
  end)

  it("does not stay behind when the broker is silent or away", function()
    line = open_line()
    start(line.port, "exit_timeout = 0.5")
    assert.equal("ok\n", (publish "before"))
    line.silent = true
    server:request(("/async?n=5&body=a&queue=%s"):format(queue))
    local old = server:reload()
    nginx.gone(old, 8)
    server:logged "5 messages were not confirmed when the worker had to leave"
    line:stop()
    server:request(("/async?n=5&body=b&queue=%s"):format(queue))
    local pids = server:workers()
    server:signal "QUIT"
    nginx.gone(pids, 8)
  end)

  it("does not stay behind for what a lost connection still writes", function()
    line = open_line()
    start(line.port, "exit_timeout = 0.5, heartbeat = 1, connect_timeout = 0.5, bytes = 64 * 1024 * 1024")
    assert.equal("ok\n", (publish "before"))
    line.stuck = true
    server:request(("/async?n=5000&queue=%s&body=%s"):format(queue, ("x"):rep(4000)))
    waits(8) -- half a second and more each: by then the lost one is closed, after its last try to write
    local pids = server:workers()
    server:signal "QUIT"
    nginx.gone(pids, 8)
  end)

  it("tells of what it had to leave when what is set up first fails too late", function()
    reconnecting([[exit_timeout = 0.2, setup = function()
      while not ngx.worker.exiting() do ngx.sleep(0.01) end
      ngx.sleep(0.5)
      return nil, require "moonrabbit.errors".new { kind = "closed", message = "not set up" }
    end]], broker.parsed().port)
    server:ready "/ping"
    server:request(("/async?n=3&body=a&queue=%s"):format(queue))
    moonrabbit.run(function()
      local answer
      moonrabbit.spawn(function() answer = server:request "/run?timeout=20" end)
      broker.eventually(function() return stats().calls == 1 end)
      server:logged "publishing: connected to"
      local pids = server:workers()
      server:signal "QUIT"
      broker.eventually(function() return answer end)
      assert.matches("^shutdown the worker has left", answer)
      nginx.gone(pids, 10)
    end)
    server:logged "3 messages were not confirmed when the worker had to leave"
  end)

  it("does not begin an attempt that nobody needs when it leaves", function()
    local port = nginx.free_port()
    reconnecting("reconnect = { first = 30, max = 30 }, connect_timeout = 30", port)
    waits(1)
    line = open_line(port)
    line.silent = true
    local pids = server:workers()
    server:signal "QUIT"
    nginx.gone(pids, 10)
  end)

  it("leaves in time though it is saying goodbye to a broker that is silent", function()
    line = open_line()
    reconnecting([[timeout = 60, setup = function()
      while not Freed do ngx.sleep(0.01) end
      return nil, require "moonrabbit.errors".new { kind = "closed", message = "not set up" }
    end]], line.port)
    server:ready "/ping"
    server:logged "publishing: connected to"
    line.silent = true
    server:request "/free"
    broker.eventually(function() return stats().reason end, 10, "what is set up has failed")
    local pids = server:workers()
    server:signal "QUIT"
    nginx.gone(pids, 12)
  end)

  it("sends again, and runs, what a session left that has ended by a mistake of its own", function()
    line = open_line()
    server = nginx.start {
      http = ([[init_worker_by_lua_block {
        local runtime = require "moonrabbit.runtime.resty"
        local spawn = runtime.spawn
        function runtime.spawn(fn, ...)
          if Broken and debug.getinfo(2, "S").short_src:find("outbound/jobs.lua", 1, true) then
            Broken = false
            error "no light thread"
          end
          return spawn(fn, ...)
        end
        require "moonrabbit.resty".start { uri = %q, reconnect = { first = 0.05 } }
      }]]):format(broker.uri { host = "127.0.0.1", port = line.port }),
      server = locations .. "location /break { content_by_lua_block { Broken = true } }",
    }
    server:ready "/ping"
    assert.equal("ok\n", (publish "before"))
    line.silent = true
    moonrabbit.run(function()
      local published, ran
      moonrabbit.spawn(function() published = publish("sent", 30) end)
      broker.eventually(function() return line.swallowed > 0 end, 10, "the proxy has it")
      line.silent = false
      server:request "/break"
      moonrabbit.spawn(function() ran = server:request "/run?timeout=30" end)
      server:logged "publishing: [^\n]*no light thread"
      broker.eventually(function() return published and ran end, 10, "both are done")
      assert.equal("ok\n", published)
      assert.equal("open\n", ran)
    end)
    assert.equal(0, stats().calls)
    assert.equal(1, stats().resent)
  end)

  it("leaves though something that was to hear of it has thrown", function()
    server = nginx.start {
      http = ([[init_worker_by_lua_block {
        require "moonrabbit.resty.life".on_exit(function() error "a mistake" end)
        require "moonrabbit.resty".start { uri = %q }
      }]]):format(broker.uri {}),
      server = locations,
    }
    server:ready "/ping"
    assert.equal("ok\n", (publish "before"))
    local pids = server:workers()
    server:signal "QUIT"
    nginx.gone(pids, 10)
    server:logged "a worker leaves: [^\n]*a mistake"
  end)

  -- Brokers that accept connections and say nothing, at these ports.
  local silent = {}

  local function open_silent(ports)
    for i, port in ipairs(ports) do
      silent[i] = open_line(port)
      silent[i].silent = true
    end
  end

  after_each(function()
    for _, each in ipairs(silent) do each:stop() end
    silent = {}
  end)

  local function free_ports(n)
    local list, uris = {}, {}
    for i = 1, n do
      list[i] = nginx.free_port()
      uris[i] = ("%q"):format(broker.uri { host = "127.0.0.1", port = list[i] })
    end
    return list, "endpoints = { " .. table.concat(uris, ", ") .. " }, "
  end

  for mode, options in pairs { direct = "", smart = [[mode = "smart", management = "http://127.0.0.1:1/", ]] } do
    it("gives an attempt up that nobody needs when it leaves, in mode " .. mode, function()
      local ports, endpoints = free_ports(2)
      open_silent(ports)
      server = nginx.start {
        http = ([[init_worker_by_lua_block {
          local rabbit = require "moonrabbit.resty"
          rabbit.start { connect_timeout = 30, %s %s }
          rabbit.consume { queue = "q", handler = function() end }
        }]]):format(endpoints, options),
        server = locations,
      }
      server:ready "/ping"
      broker.eventually(function() return #silent[1].lines + #silent[2].lines == 4 end, 10, "two connections begin")
      local pids = server:workers()
      server:signal "QUIT"
      nginx.gone(pids, 12)
    end)
  end

  it("gives the look-up of an SRV name up when it leaves, though the name server is silent", function()
    local dns = dns_server.start { ["_amqp._tcp.broker.test"] = function() end }
    finally(dns.stop)
    server = nginx.start {
      http = ([[init_worker_by_lua_block {
        require "moonrabbit.resty".start { uri = "amqp+srv://_amqp._tcp.broker.test", connect_timeout = 60,
          dns = { servers = { %q }, search = {}, timeout = 60 } }
      }]]):format(dns.address),
      server = locations,
    }
    server:ready "/ping"
    broker.eventually(function() return #dns.asked == 1 end, 10, "it is asked")
    local pids = server:workers()
    server:signal "QUIT"
    nginx.gone(pids, 12)
  end)

  it("gives a look at the management API up when it leaves, though that is silent", function()
    local ports = free_ports(2)
    open_silent(ports)
    server = nginx.start {
      http = ([[init_worker_by_lua_block {
        require "moonrabbit.resty".start { uri = %q, connect_timeout = 60, mode = "smart",
          management = { uri = "http://127.0.0.1:%d", timeout = 60 } }
      }]]):format(broker.uri { host = "127.0.0.1", port = ports[1] }, ports[2]),
      server = locations,
    }
    server:ready "/ping"
    broker.eventually(function() return #silent[1].lines + #silent[2].lines == 4 end, 10, "both are asked")
    local pids = server:workers()
    server:signal "QUIT"
    nginx.gone(pids, 12)
  end)

  it("stays no longer than it may for an attempt that is needed, however many brokers are silent", function()
    local ports, endpoints = free_ports(8)
    open_silent(ports)
    server = nginx.start {
      http = ([[init_worker_by_lua_block {
        require "moonrabbit.resty".start { %s connect_timeout = 40, exit_timeout = 1 }
      }]]):format(endpoints),
      server = locations,
    }
    server:ready "/ping"
    broker.eventually(function() return #silent[1].lines == 2 end, 10, "a connection begins")
    server:request(("/async?n=3&body=a&queue=%s"):format(queue))
    local pids = server:workers()
    server:signal "QUIT"
    nginx.gone(pids, 12)
    server:logged "3 messages were not confirmed when the worker had to leave"
  end)

  it("stays no longer than it may for an attempt that begins while it leaves", function()
    local ports, endpoints = free_ports(8)
    server = nginx.start {
      http = ([[init_worker_by_lua_block {
        require "moonrabbit.resty".start { %s connect_timeout = 40, exit_timeout = 2.5,
          reconnect = { first = 1, max = 1, jitter = 0 } }
      }]]):format(endpoints),
      server = locations,
    }
    server:ready "/ping"
    waits(1)
    open_silent(ports)
    server:request(("/async?n=3&body=a&queue=%s"):format(queue))
    local pids = server:workers()
    server:signal "QUIT"
    nginx.gone(pids, 12)
    server:logged "3 messages were not confirmed when the worker had to leave"
  end)

  it("stays no longer than it may for what is set up while the broker is silent", function()
    line = open_line()
    reconnecting([[exit_timeout = 0.5, timeout = 60, setup = function(conn)
      while not Freed do ngx.sleep(0.01) end
      local opened, err = conn:channel()
      return opened and true, err
    end]], line.port)
    server:ready "/ping"
    server:logged "publishing: connected to"
    server:request(("/async?n=3&body=a&queue=%s"):format(queue))
    line.silent = true
    server:request "/free"
    local pids = server:workers()
    server:signal "QUIT"
    nginx.gone(pids, 12)
    server:logged "3 messages were not confirmed when the worker had to leave"
  end)

  it("tells functions that wait for a connection when there will be none, for the password is wrong", function()
    local port = nginx.free_port()
    server = nginx.start {
      http = ([[init_worker_by_lua_block {
        require "moonrabbit.resty".start { uri = "amqp://guest:wrong@127.0.0.1:%d/",
          reconnect = { first = 0.05, max = 0.2 } }
      }]]):format(port),
      server = locations,
    }
    server:ready "/ping"
    moonrabbit.run(function()
      local answer
      moonrabbit.spawn(function() answer = server:request "/run?timeout=20" end)
      broker.eventually(function() return stats().calls == 1 end)
      line = open_line(port)
      broker.eventually(function() return answer end)
      assert.matches("^auth ", answer)
      assert.equal(0, stats().calls)
    end)
  end)

  it("tells functions that wait for a connection when it must leave", function()
    reconnecting "exit_timeout = 0.5"
    moonrabbit.run(function()
      local answer
      moonrabbit.spawn(function() answer = server:request "/run?timeout=20" end)
      broker.eventually(function() return stats().calls == 1 end)
      local pids = server:workers()
      server:signal "QUIT"
      broker.eventually(function() return answer end)
      assert.matches("^shutdown the worker has left", answer)
      nginx.gone(pids, 10)
    end)
  end)

  it("waits for the next attempt no longer than it may stay", function()
    reconnecting "reconnect = { first = 30, max = 30 }, exit_timeout = 0.5"
    waits(1)
    server:request(("/async?n=3&body=a&queue=%s"):format(queue))
    local pids = server:workers()
    server:signal "QUIT"
    nginx.gone(pids, 8)
    server:logged "3 messages were not confirmed when the worker had to leave"
  end)

  it("is there again after a crash, and stops at once when told to", function()
    start(broker.parsed().port)
    assert.equal("ok\n", (publish "one"))
    local pid = server:workers()[1]
    os.execute("kill -KILL " .. pid)
    broker.eventually(function() return not nginx.alive(pid) and publish("two") == "ok\n" end)
    local pids = server:workers()
    server:signal "TERM"
    nginx.gone(pids, 6)
    local seen = taken()
    assert.equal(1, seen.one)
    assert.truthy(seen.two)
  end)
end)
