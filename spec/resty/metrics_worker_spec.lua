-- What one worker of nginx leaves in the dictionary of metrics, without being asked for it: when it has changed, when there
-- is no room, and when it goes.
local broker = require "support.broker"
local cjson = require "cjson.safe"
local native = require "moonrabbit.runtime.native"
local nginx = require "support.nginx"
local proxy = require "support.proxy"
local ok = broker.ok

local http = [[
  lua_shared_dict numbers 256k;
  lua_shared_dict hold 64k;
  lua_max_running_timers 8;
  init_worker_by_lua_block {
    if ngx.worker.id() ~= 0 then return end
    local rabbit = require "moonrabbit.resty"
    rabbit.start { uri = "$uri", name = "edge", reconnect = { first = 0.05, max = 0.2 }, exit_timeout = 5, entries = 3,
      metrics = "numbers" }
    rabbit.start { uri = "$uri", name = "edge", metrics = "numbers", default = false, entries = 7 }
    rabbit.consume { app = "../$name.lua" }
    local own = require "moonrabbit.resty.metrics".worker()
    Fit, Well = true, true
    local function check(value, name)
      if value == "throw" then error("un" .. name) end
      return value, "not " .. name
    end
    own.metrics:ready("fit", function() return check(Fit, "fit") end)
    own.metrics:healthy("well", function() return check(Well, "well") end)
  }
]]

local locations = [[
  location = /ping { return 200 "pong\n"; }
  location = /metrics { content_by_lua_block { require "moonrabbit.resty.metrics".serve() } }
  location = /readyz { content_by_lua_block { require "moonrabbit.resty.metrics".readyz() } }
  location = /healthz { content_by_lua_block { require "moonrabbit.resty.metrics".healthz() } }
  location = /set {
    content_by_lua_block {
      local values = { yes = true, no = false, throw = "throw" }
      Fit, Well = values[ngx.var.arg_fit], values[ngx.var.arg_well]
    }
  }
  location = /key {
    content_by_lua_block { ngx.print(tostring(ngx.shared.numbers:get("moonrabbit:" .. ngx.var.arg_name))) }
  }
  location = /lock {
    content_by_lua_block {
      local numbers = ngx.shared.numbers
      if ngx.var.arg_on then assert(numbers:add("moonrabbit:lock", 1, 60)) else numbers:delete "moonrabbit:lock" end
    }
  }
  location = /stranger {
    content_by_lua_block {
      -- As a worker of another nginx, or whoever has the number of its process now, would be.
      local numbers = ngx.shared.numbers
      local slot = numbers:incr("moonrabbit:slots", 1)
      numbers:set("moonrabbit:page:" .. slot,
        "# TYPE spec_left_total counter\nspec_left_total 5\n# TYPE spec_level gauge\nspec_level 7\n")
      numbers:set("moonrabbit:pid:" .. slot, "1 0")
      ngx.print(slot)
    }
  }
  location = /fill {
    content_by_lua_block {
      local dict, size, n = ngx.shared.numbers, 65536, 0
      while size >= 16 do
        n = n + 1
        if not dict:safe_add("junk" .. n, ("x"):rep(size)) then size = size / 2 end
      end
      ngx.print(n)
    }
  }
  location = /empty {
    content_by_lua_block {
      for i = 1, tonumber(ngx.var.arg_n) do ngx.shared.numbers:delete("junk" .. i) end
    }
  }
  location = /grow {
    content_by_lua_block {
      local own = require "moonrabbit.resty.metrics".worker()
      local growth = own.metrics.registry:counter("spec_growth_total", "Series.", { "n" })
      for i = 1, tonumber(ngx.var.arg_n) do growth:with(("x"):rep(100) .. i):inc() end
      own:touch()
    }
  }
  location = /publish {
    content_by_lua_block {
      local ok, err = require "moonrabbit.resty".publish("x", { routing_key = "$name",
        timeout = tonumber(ngx.var.arg_timeout) })
      ngx.print(ok and "ok" or err.kind)
    }
  }
  location = /async {
    content_by_lua_block {
      local ok, err = require "moonrabbit.resty".publish_async("x", { routing_key = "$name" })
      ngx.print(ok and "ok" or err.kind)
    }
  }
  location = /busy {
    content_by_lua_block {
      for _ = 1, 20 do ngx.timer.at(0, function() while not Freed do ngx.sleep(0.01) end end) end
      ngx.sleep(0.05)
      ngx.print(ngx.timer.running_count())
    }
  }
  location = /free { content_by_lua_block { Freed = true } }
  location = /linger {
    content_by_lua_block {
      local hold = ngx.shared.hold
      hold:set("here", true)
      while not hold:get "on" do ngx.sleep(0.01) end
      for _ = 1, 3 do assert(require "moonrabbit.resty".publish("x", { routing_key = "$name" })) end
      ngx.print "ok"
    }
  }
  location = /held { content_by_lua_block { ngx.print(tostring(ngx.shared.hold:get "here")) } }
  location = /let_go { content_by_lua_block { ngx.shared.hold:set("on", true) } }
]]

local script = [[
  local mr = require "moonrabbit"
  return mr.app { name = "$name", queues = { ["$name.in"] = {} },
    consumers = { { queue = "$name.in", handler = function() end } } }
]]

describe("the metrics of one worker #resty", function()
  if not broker.url then pending "AMQP_URL is not set" return end
  if nginx.missing() then pending(nginx.missing()) return end

  local name, server, line, path, channel = broker.unique "worker", nil, nil, nil, nil

  local function fill(text)
    return (text:gsub("%$(%l+)", { name = name, uri = broker.uri { host = "127.0.0.1", port = line.port } }))
  end

  local function write(text)
    path = nginx.here .. "/build/" .. name .. ".lua"
    local file = assert(io.open(path, "w"))
    file:write((text:gsub("%$name", name)))
    file:close()
  end

  setup(function() write(script) end)

  before_each(function()
    local to = broker.parsed()
    line = proxy.start(to.host, to.port)
    channel = ok(broker.connect():channel())
    ok(channel:queue_declare(name))
  end)

  after_each(function()
    server:stop()
    line:stop()
    for _, queue in ipairs { "", ".in", ".in.dead" } do channel:queue_delete(name .. queue) end
    channel:exchange_delete(name .. ".home")
    broker.close_all()
  end)

  teardown(function() os.remove(path) end)

  local function get(at) return (server:request(at)) or "" end

  local function start(workers)
    server = nginx.start({ workers = workers, http = fill(http), server = fill(locations) }):ready "/ping"
  end

  local function start_ready()
    start()
    broker.eventually(function() return select(2, server:request "/readyz") == 200 end, 20, "it is ready")
  end

  -- What lies in the dictionary, and is there without this worker's being asked.
  local function kept(series, slot)
    return tonumber(get("/key?name=page:" .. (slot or 1)):match("\n" .. series:gsub("%p", "%%%0") .. " (%S+)\n"))
  end

  local function keeps(series, n)
    broker.eventually(function() return kept(series) == n end, 10, series .. " is kept as " .. n)
  end

  local function served(series)
    return tonumber(get("/metrics"):match("\n" .. series:gsub("%p", "%%%0") .. " (%S+)\n"))
  end

  local PUBLISHED = 'moonrabbit_publishes_total{publisher="edge"}'
  local function errors(kind) return ('moonrabbit_publish_errors_total{publisher="edge",kind="%s"}'):format(kind) end

  it("are there a moment after something has happened, without being asked for", function()
    start_ready()
    for _ = 1, 3 do assert.equal("ok", get "/publish") end
    keeps(PUBLISHED, 3)
    ok(channel:publish("x", { routing_key = name .. ".in" }))
    keeps(('moonrabbit_messages_settled_total{queue="%s.in",outcome="ok"}'):format(name), 1)
  end)

  it("are there after all, when nginx has run too many timers for a while", function()
    start_ready()
    assert.equal("ok", get "/publish")
    keeps(PUBLISHED, 1)
    assert.equal("8", get "/busy")
    assert.equal("ok", get "/publish")
    server:logged "metrics.lua:%d+: 8 lua_max_running_timers are not enough"
    get "/free"
    assert.equal(1, kept(PUBLISHED))
    broker.eventually(function() return get "/publish" == "ok" and kept(PUBLISHED) > 1 end)
  end)

  it("tell two publishers of one name apart", function()
    start_ready()
    assert.equal(3, served 'moonrabbit_publisher_window{publisher="edge"}')
    assert.equal(7, served 'moonrabbit_publisher_window{publisher="edge-2"}')
  end)

  it("count what was refused, what its callers gave up, what waits and what was sent again", function()
    start_ready()
    line.silent = true
    assert.equal("timeout", get "/publish?timeout=0.05")
    keeps(errors "timeout", 1)
    for _, answer in ipairs { "ok", "ok", "overflow" } do assert.equal(answer, get "/async") end
    keeps(errors "overflow", 1)
    broker.eventually(function() return served 'moonrabbit_publisher_unconfirmed{publisher="edge"}' == 3 end)
    assert.equal(3, served 'moonrabbit_publisher_bytes{publisher="edge"}')
    line.silent = false
    line:cut()
    keeps('moonrabbit_publishes_resent_total{publisher="edge"}', 3)
    keeps('moonrabbit_publisher_unconfirmed{publisher="edge"}', 0)
  end)

  it("have checks of one's own, which are asked now, and may throw", function()
    start_ready()
    local function missing(at)
      local body, status = server:request(at)
      local list = (cjson.decode(body) or {}).missing or {}
      return status, list[1] and list[1].name, list[1] and list[1].reason
    end
    assert.same({ 200 }, { missing "/healthz" })
    get "/set?fit=no&well=no"
    assert.same({ 503, "fit", "not fit" }, { missing "/readyz" })
    assert.same({ 503, "well", "not well" }, { missing "/healthz" })
    get "/set?fit=throw&well=throw"
    for at, text in pairs { ["/readyz"] = "the check threw: .*unfit", ["/healthz"] = "the check threw: .*unwell" } do
      local status, _, reason = missing(at)
      assert.equal(503, status)
      assert.matches(text, reason)
    end
    get "/set?fit=yes&well=yes"
    assert.same({ 200 }, { missing "/readyz" })
  end)

  it("miss a worker that has none", function()
    start(2)
    broker.eventually(function()
      local body, status = server:request "/readyz"
      return status == 503 and body
        == '{"missing":[{"name":"worker","reason":"it has not started","worker":1}],"ready":false}\n'
    end, 20, "worker 1 is missing, and nothing else")
  end)

  it("know that an app runs which has taken its time to begin, without being asked for it", function()
    finally(function() write(script) end)
    write [[
      local mr = require "moonrabbit"
      local store, attached = { commit = function() return true end, abort = function() return true end }, 0
      function store.begin() return "new" end
      function store.attach()
        attached = attached + 1
        if attached == 2 then mr.sleep(2.5) end -- as it starts; before that it is checked
      end
      return mr.app { name = "$name", queues = { ["$name.in"] = {} },
        consumers = { { queue = "$name.in", dedupe = store, handler = function() end } } }
    ]]
    start()
    local function missing() return (server:request "/key?name=missing:1") end
    broker.eventually(function() return missing() == ("app %s\tstarting\n"):format(name) end, 10, "all else is ready")
    broker.eventually(function() return missing() == "" end, 10, "it runs")
  end)

  it("are not looked at while another worker does", function()
    start_ready()
    get "/lock?on=1"
    local body, status = server:request "/metrics"
    assert.equal(500, status, body)
    server:logged "metrics: the lock of the metrics is held"
    get "/lock"
    assert.equal(200, (select(2, server:request "/metrics")))
  end)

  it("of who is gone: what was counted stays, levels go, and no slot is looked at twice", function()
    start_ready()
    local slot = tonumber(get "/stranger")
    assert.equal(5, served "spec_left_total")
    assert.is_nil(served "spec_level")
    assert.equal("nil", get("/key?name=page:" .. slot))
    assert.equal(5, served "spec_left_total")
    local pid = server:workers()[1]
    os.execute("kill -KILL " .. pid)
    nginx.gone { pid }
    broker.eventually(function() return get "/key?name=slots" == tostring(slot + 1) end)
    assert.equal(5, served "spec_left_total")
    assert.equal(tostring(slot + 1), get "/key?name=first")
    assert.equal("nil", get "/key?name=pid:1")
  end)

  it("come into a dictionary as soon as there is room, and what was in it stays until then", function()
    start_ready()
    for _ = 1, 3 do assert.equal("ok", get "/publish") end
    keeps(PUBLISHED, 3)
    local n = get "/fill"
    get "/grow?n=150"
    server:logged "metrics: the dictionary 'numbers' is too small"
    for _ = 1, 4 do
      assert.equal("ok", get "/publish")
      assert.equal(500, (select(2, server:request "/metrics")))
    end
    assert.equal(3, kept(PUBLISHED))
    -- Whatever was to write it has tried since, and will try again.
    local since = native.now()
    broker.eventually(function() return native.now() - since > 1.5 end)
    local _, lines = server:log():gsub("metrics: the dictionary 'numbers' is too small", "")
    assert.truthy(lines <= 1 + 4, lines) -- once, and once for each page that was asked for
    get("/empty?n=" .. n)
    keeps(PUBLISHED, 7)
    keeps(('spec_growth_total{n="%s150"}'):format(("x"):rep(100)), 1)
  end)

  it("of a worker that leaves while there is no room are kept where its page stood", function()
    start_ready()
    for _ = 1, 3 do assert.equal("ok", get "/publish") end
    keeps(PUBLISHED, 3)
    local n = get "/fill"
    get "/grow?n=30"
    server:logged "metrics: the dictionary 'numbers' is too small"
    for _ = 1, 4 do assert.equal("ok", get "/publish") end
    assert.equal(3, kept(PUBLISHED))
    nginx.gone(server:reload(), 10)
    assert.equal(7, kept(PUBLISHED))
    get("/empty?n=" .. n)
    broker.eventually(function() return served(PUBLISHED) == 7 end, 10, "all is there")
    assert.equal(1, served(('spec_growth_total{n="%s30"}'):format(("x"):rep(100))))
  end)

  -- Two publishers and an app; the latter publishes by a connection of its own, as soon as it can consume.
  for let_in, begun in pairs { [0] = 3, [3] = 4 } do
    it(("know of no loss where one that leaves gives up connecting after %d connections"):format(let_in), function()
      local starts = 0
      function line.swallows(bytes)
        if bytes:sub(8, 11) ~= "\0\10\0\10" then return false end -- connection.start
        starts = starts + 1
        return starts > let_in
      end
      start()
      broker.eventually(function() return starts == begun end, 10, "all begin")
      line.swallows = nil
      nginx.gone(server:reload(), 10)
      broker.eventually(function() return select(2, server:request "/readyz") == 200 end, 10, "the next one is ready")
      local page = get "/metrics"
      assert.matches("moonrabbit_connection_up", page)
      assert.is_nil(page:match '\nmoonrabbit_connection_losses_total{[^}]*kind="shutdown"} %d+')
    end)
  end

  it("of one that has left but for a request lack nothing, and what it does last is counted", function()
    start_ready()
    assert.equal("ok", get "/publish")
    local moonrabbit = require "moonrabbit"
    moonrabbit.run(function()
      local answer
      moonrabbit.spawn(function() answer = get "/linger" end)
      broker.eventually(function() return get "/held" == "true" end)
      local old = server:reload()
      broker.eventually(function() return kept('moonrabbit_connection_up{connection="edge (publish)"}') == 0 end, 10,
        "the old worker has closed its connections")
      broker.eventually(function() return select(2, server:request "/readyz") == 200 end, 10, "nothing is missing")
      get "/let_go"
      broker.eventually(function() return answer end)
      assert.equal("ok", answer, server:log())
      nginx.gone(old, 10)
    end)
    assert.equal(4, served(PUBLISHED))
  end)
end)
