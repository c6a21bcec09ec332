-- Metrics in nginx: any worker answers with the sum of all, over reloads and crashes.
local broker = require "support.broker"
local cjson = require "cjson.safe"
local nginx = require "support.nginx"
local proxy = require "support.proxy"
local ok = broker.ok

local http = [[
  lua_shared_dict numbers 1m;
  lua_shared_dict hold 64k;
  init_worker_by_lua_block {
    local rabbit = require "moonrabbit.resty"
    local metrics = require "moonrabbit.resty.metrics"
    ngx.log(ngx.NOTICE, "start: ", select(2, pcall(rabbit.start, { metrics = "nowhere" })), " end")
    ngx.log(ngx.NOTICE, "worker: ", select(2, pcall(metrics.worker)), " end")
    rabbit.start { uri = "$uri", name = "edge", reconnect = { first = 0.05, max = 0.2 }, exit_timeout = 3,
      metrics = "numbers" }
    rabbit.consume { app = "../$name.lua" }
    local own = metrics.worker()
    local visits = own.metrics.registry:counter("spec_visits_total", "Visits.")
    function Visit()
      visits:with():inc()
      own:touch()
    end
  }
]]

local locations = [[
  location = /ping { content_by_lua_block { Visit() ngx.say "pong" } }
  location = /metrics { content_by_lua_block { require "moonrabbit.resty.metrics".serve() } }
  location = /hold { content_by_lua_block { ngx.shared.hold:set("on", ngx.var.arg_on == "1") ngx.say "ok" } }
  location = /readyz { content_by_lua_block { require "moonrabbit.resty.metrics".readyz() } }
  location = /healthz { content_by_lua_block { require "moonrabbit.resty.metrics".healthz() } }
  location = /publish {
    content_by_lua_block {
      local ok, err = require "moonrabbit.resty".publish("x", { routing_key = ngx.var.arg_key, timeout = 2 })
      ngx.say(ok and "ok" or err.kind)
    }
  }
]]

local script = [[
local mr = require "moonrabbit"
return mr.app {
  name = "$name",
  queues = { ["$name"] = {} },
  consumers = {
    { queue = "$name", concurrency = 8, handler = function()
      repeat mr.sleep(0.001) until not ngx.shared.hold:get "on"
    end },
  },
}
]]

describe("metrics in nginx #resty", function()
  if not broker.url then pending "AMQP_URL is not set" return end
  if nginx.missing() then pending(nginx.missing()) return end

  local name, server, line, path = broker.unique "metrics", nil, nil, nil

  local function fill(text)
    return (text:gsub("%$(%l+)", { name = name, uri = broker.uri { host = "127.0.0.1", port = line.port } }))
  end

  setup(function()
    local to = broker.parsed()
    line = proxy.start(to.host, to.port)
    path = nginx.here .. "/build/" .. name .. ".lua"
    local file = assert(io.open(path, "w"))
    file:write((fill(script)))
    file:close()
    server = nginx.start({ workers = 2, http = fill(http), server = locations }):ready "/ping"
    broker.eventually(function() return select(2, server:request "/readyz") == 200 end, 20, "all workers are ready")
  end)

  teardown(function()
    server:stop()
    line:stop()
    os.remove(path)
    local channel = ok(broker.connect():channel())
    channel:queue_delete(name)
    channel:queue_delete(name .. ".dead")
    channel:exchange_delete(name .. ".home")
    broker.close_all()
  end)

  local function page() return (server:request "/metrics") or "" end

  local function value(text, series) return tonumber(text:match("\n" .. series:gsub("%p", "%%%0") .. " (%S+)\n")) end

  local PUBLISHED, HANDLED = 'moonrabbit_publishes_total{publisher="edge"}',
    ('moonrabbit_messages_settled_total{queue="%s",outcome="ok"}'):format(name)
  local UP = {
    ('moonrabbit_connection_up{connection="%s (consume)"}'):format(name),
    ('moonrabbit_connection_up{connection="%s (publish)"}'):format(name),
    'moonrabbit_connection_up{connection="edge (publish)"}',
  }

  local function publish(n)
    for _ = 1, n do assert.equal("ok\n", (server:request("/publish?key=" .. name)), server:log()) end
  end

  local function come_to(series, n)
    broker.eventually(function() return value(page(), series) == n end, 10, series .. " is " .. n)
  end

  -- Publishes, does something, and sees that the sums never fall and lose nothing.
  local function counts_on(what)
    local before, handled = value(page(), PUBLISHED), value(page(), HANDLED)
    publish(20)
    -- A crash may take what was done since the last page.
    come_to(PUBLISHED, before + 20)
    come_to(HANDLED, handled + 20)
    local last = 0
    local function look()
      local text = page()
      local now = value(text, PUBLISHED)
      if not now then return nil end -- the worker that was asked is gone
      assert.truthy(now >= last, ("%g after %g"):format(now, last))
      last = now
      return text
    end
    look()
    local gone = what()
    broker.eventually(function()
      look()
      for _, pid in ipairs(gone) do
        if nginx.alive(pid) then return false end
      end
      return true
    end, 15, "the old workers are gone")
    broker.eventually(function()
      local text = look()
      for _, series in ipairs(UP) do
        if not text or value(text, series) ~= 2 then return false end
      end
      return true
    end, 15, "the gauges are those of two workers")
    assert.equal(before + 20, last)
    publish(5)
    come_to(PUBLISHED, before + 25)
    come_to(HANDLED, handled + 25)
  end

  it("adds up what all workers do", function()
    local before = value(page(), PUBLISHED) or 0
    publish(30)
    assert.equal("unroutable\n", (server:request "/publish?key=no-such-queue"))
    come_to(PUBLISHED, before + 31)
    come_to(HANDLED, 30)
    -- The other worker's page may be from the middle of a publish.
    come_to('moonrabbit_publish_errors_total{publisher="edge",kind="unroutable"}', 1)
    come_to('moonrabbit_publish_seconds_count{publisher="edge"}', 30)
    come_to(('moonrabbit_handler_seconds_count{queue="%s"}'):format(name), 30)
    for _, series in ipairs(UP) do come_to(series, 2) end
    local text, status, headers = server:request "/metrics"
    assert.equal(200, status)
    assert.equal("text/plain; version=0.0.4; charset=utf-8", headers["content-type"])
    assert.equal(20000, value(text, 'moonrabbit_publisher_window{publisher="edge"}'))
    -- What would be the other worker's visits alone is in it too.
    local visits = value(text, "spec_visits_total")
    for _ = 1, 10 do server:request "/ping" end
    come_to("spec_visits_total", visits + 10)
  end)

  it("tells how many messages are being handled now, in all workers", function()
    local in_flight = ('moonrabbit_messages_in_flight{queue="%s"}'):format(name)
    local handled = value(page(), HANDLED)
    come_to(in_flight, 0)
    server:request "/hold?on=1"
    publish(6)
    come_to(in_flight, 6)
    -- What a worker that dies was handling comes to one that lives, and is counted there.
    os.execute("kill -KILL " .. server:workers()[1])
    come_to(in_flight, 6)
    assert.equal(handled, value(page(), HANDLED))
    server:request "/hold?on=0"
    come_to(in_flight, 0)
    come_to(HANDLED, handled + 6)
  end)

  it("is a page that promtool finds nothing wrong with", function()
    if nginx.shell "command -v promtool" == "" then return pending "promtool is not installed" end
    local file = server.prefix .. "/page"
    local handle = assert(io.open(file, "w"))
    handle:write(page())
    handle:close()
    local said = nginx.shell("promtool check metrics < '" .. file .. "' 2>&1; echo rc=$?")
    assert.equal("rc=0", said)
  end)

  it("counts on over a crash: sums never fall, gauges are those of the living", function()
    counts_on(function()
      local pid = server:workers()[1]
      os.execute("kill -KILL " .. pid)
      return { pid }
    end)
  end)

  it("counts on over reloads", function()
    counts_on(function() return server:reload() end)
    counts_on(function() return server:reload() end)
  end)

  it("says who is not ready, and why", function()
    broker.eventually(function() return server:request "/readyz" == '{"ready":true}\n' end, 10, "all are ready")
    line:stop()
    broker.eventually(function() return select(2, server:request "/readyz") == 503 end)
    broker.eventually(function()
      local answer = cjson.decode((server:request "/readyz")) or {}
      local seen = {}
      for _, each in ipairs(answer.missing or {}) do seen[("%d %s"):format(each.worker, each.name)] = each.reason end
      for worker = 0, 1 do
        if not seen[worker .. " app " .. name] then return false end
        if not tostring(seen[worker .. " connection edge (publish)"]):find "refused" then return false end
      end
      return answer.ready == false
    end, 10, "all is missing")
    assert.equal(200, (select(2, server:request "/healthz")))
    for _, series in ipairs(UP) do come_to(series, 0) end
    local to = broker.parsed()
    line = proxy.start(to.host, to.port, line.port)
    broker.eventually(function() return select(2, server:request "/readyz") == 200 end, 15, "ready again")
    for _, series in ipairs(UP) do come_to(series, 2) end
    assert.truthy(value(page(), 'moonrabbit_connection_recoveries_total{connection="edge (publish)"}') >= 2)
  end)

  it("answers GET and HEAD only", function()
    assert.equal(405, (select(2, server:request("/metrics", { method = "POST", body = "x" }))))
    local body, status, headers = server:request("/metrics", { method = "HEAD" })
    assert.equal("", body)
    assert.equal(200, status)
    assert.truthy(tonumber(headers["content-length"]) > 1000)
  end)

  it("says at the start what is missing", function()
    assert.matches("option 'metrics': there is no dictionary 'nowhere': nginx needs `lua_shared_dict nowhere 1m;`",
      server:log())
    assert.matches("worker: [^\n]*start { metrics = \"…\" } in init_worker_by_lua%* first", server:log())
    local log = server:log():gsub("[^\n]*exited on signal 9[^\n]*", "")
    assert.is_nil(log:find("%[alert%]"), log)
  end)
end)

describe("metrics in a dictionary that is too small #resty", function()
  if not broker.url then pending "AMQP_URL is not set" return end
  if nginx.missing() then pending(nginx.missing()) return end

  local name, server = broker.unique "small", nil

  local small = [[
    lua_shared_dict numbers $size;
    init_worker_by_lua_block {
      require "moonrabbit.resty".start { uri = os.getenv "AMQP_URL", name = "edge", metrics = "numbers" }
    }
  ]]

  -- Others keep things in the dictionary too, until nothing fits.
  local others = locations .. [[
    location = /fill {
      content_by_lua_block {
        local dict, size, n = ngx.shared.numbers, 65536, 0
        while size >= 16 do
          n = n + 1
          if not dict:safe_add("junk" .. n, ("x"):rep(size)) then size = size / 2 end
        end
        ngx.say(n)
      }
    }
    location = /empty {
      content_by_lua_block {
        for i = 1, tonumber(ngx.var.arg_n) do ngx.shared.numbers:delete("junk" .. i) end
        ngx.say "ok"
      }
    }
    location = /grow {
      content_by_lua_block {
        local own = require "moonrabbit.resty.metrics".worker()
        local growth = own.metrics.registry:counter("spec_growth_total", "Series.", { "n" })
        for i = 1, 150 do growth:with(("x"):rep(100) .. i):inc() end
        own:touch()
        ngx.say "ok"
      }
    }
  ]]

  local function start(size)
    server = nginx.start { workers = 2, http = (small:gsub("%$size", size)), server = (others:gsub("Visit%(%)", "")) }
    server:ready "/ping"
  end

  local function publish(n)
    for _ = 1, n do assert.equal("ok\n", (server:request("/publish?key=" .. name)), server:log()) end
  end

  local function published()
    local text, status = server:request "/metrics"
    return status == 200 and tonumber(text:match '\nmoonrabbit_publishes_total{publisher="edge"} (%S+)\n') or status
  end

  local function come_to(n)
    broker.eventually(function() return published() == n end, 10, "the metrics say " .. n)
  end

  setup(function() ok(ok(broker.connect():channel()):queue_declare(name)) end)

  after_each(function()
    local log = server:log():gsub("[^\n]*exited on signal 9[^\n]*", "")
    server:stop()
    assert.is_nil(log:find "%[alert%]", log)
  end)

  teardown(function()
    ok(broker.connect():channel()):queue_delete(name)
    broker.close_all()
  end)

  local TOO_SMALL = "the dictionary 'numbers' is too small for what is measured (no memory): "
    .. "make its `lua_shared_dict` larger"

  local function complaints()
    local n = 0
    for _ in server:log():gmatch("metrics: " .. TOO_SMALL:gsub("%p", "%%%0")) do n = n + 1 end
    return n
  end

  it("says so, in place of numbers that lack something, and publishing goes on", function()
    start "12k"
    publish(5)
    assert.equal(500, published())
    assert.truthy(complaints() > 0, server:log())
    publish(5)
  end)

  it("loses no count: what is there stays, the rest comes when there is room", function()
    start "1m"
    publish(10)
    come_to(10)
    local n = tonumber((server:request "/fill"))
    server:request "/grow"
    broker.eventually(function() return published() == 500 end, 10, "it does not fit")
    assert.truthy(complaints() > 0, server:log())
    publish(10)
    server:request("/empty?n=" .. n)
    come_to(20)
    assert.equal(150, select(2, server:request("/metrics"):gsub("\nspec_growth_total", "")))
    -- What a worker that dies has left counts on, though there is no room to bury it, nor for its successor.
    n = tonumber((server:request "/fill"))
    local pid = server:workers()[1]
    os.execute("kill -KILL " .. pid)
    nginx.gone { pid }
    broker.eventually(function() return #server:workers() == 2 end, 10, "another worker")
    publish(10)
    for _ = 1, 4 do published() end -- who looks finds no room to bury it
    server:request("/empty?n=" .. n)
    come_to(30)
  end)
end)
