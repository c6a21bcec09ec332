local mr = require "moonrabbit"
local fake = require "support.fake_broker"
local scripted = require "support.scripted"
local metrics = require "moonrabbit.metrics"
local families = require "moonrabbit.metrics.families"
local numbers = require "moonrabbit.metrics.numbers"
local Registry = metrics.Registry

local function slurp(path)
  local file = assert(io.open(path))
  local text = file:read "*a"
  file:close()
  return text
end

describe("numbers of metrics", function()
  it("are exact and short", function()
    for n, text in pairs { [0] = "0", [17] = "17", [0.1] = "0.1", [2 ^ 52] = "4503599627370496", [1 / 3] = false } do
      local written = numbers.write(n)
      assert.equal(n, numbers.read(written))
      if text then assert.equal(text, written) end
    end
    assert.equal("+Inf", numbers.write(math.huge))
    assert.equal("-Inf", numbers.write(-math.huge))
    assert.equal("NaN", numbers.write(0 / 0))
  end)
end)

describe("the registry", function()
  it("writes the format of Prometheus, in a stable order", function()
    local registry = Registry.new()
    local b = registry:counter("b_total", "Back\\slash\nline.", { "x" })
    b:with('q"\\\n'):inc(2)
    b:with("a"):inc()
    registry:gauge("a_now", "A gauge."):with():set(1.5)
    assert.equal(table.concat({
      "# HELP a_now A gauge.", "# TYPE a_now gauge", "a_now 1.5",
      "# HELP b_total Back\\\\slash\\nline.", "# TYPE b_total counter",
      'b_total{x="a"} 1', 'b_total{x="q\\"\\\\\\n"} 2', "",
    }, "\n"), registry:text())
  end)

  it("puts a value on a bucket's bound into that bucket, and cumulates", function()
    local registry = Registry.new()
    local h = registry:histogram("h_seconds", "H.", { "q" }, { bounds = { 0.1, 1 } }):with "x"
    for _, value in ipairs { 0.1, 0.05, 1, 1.01, 100 } do h:observe(value) end
    local text = registry:text()
    for _, line in ipairs {
      'h_seconds_bucket{q="x",le="0.1"} 2', 'h_seconds_bucket{q="x",le="1"} 3', 'h_seconds_bucket{q="x",le="+Inf"} 5',
      'h_seconds_count{q="x"} 5',
    } do
      assert.truthy(text:find(line .. "\n", 1, true), line .. "\n" .. text)
    end
  end)

  it("is bounded: past the most series values become other, but for closed labels", function()
    local registry = Registry.new { max_series = 2 }
    local family = registry:counter("c_total", "C.", { "queue", "outcome" }, { closed = { "outcome" } })
    for i = 1, 1000 do family:with("q" .. i, i % 2 == 0 and "ok" or "retry"):inc() end
    assert.equal(4, #family.order)
    assert.equal(499, family:with("other", "ok").value)
    assert.equal(499, family:with("other", "retry").value)
  end)

  it("cuts long values, and lets no bytes through that are no UTF-8", function()
    local registry = Registry.new()
    local family = registry:counter("c_total", "C.", { "queue" })
    family:with(("x"):rep(1000)):inc()
    family:with("a\255b"):inc()
    assert.falsy(registry:text():find "\255")
    assert.falsy(registry:text():find(("x"):rep(129), 1, true))
  end)

  it("refuses bad names and the wrong number of labels", function()
    local registry = Registry.new()
    assert.has_error(function() registry:counter("a b", "x") end)
    assert.has_error(function() registry:counter("a_total", "x", { "le" }) end)
    local family = registry:counter("a_total", "x", { "q" })
    assert.has_error(function() family:with() end)
    assert.has_error(function() registry:gauge("a_total", "x") end)
    assert.has_error(function() registry:histogram("h", "x", {}, { bounds = { 2, 1 } }) end)
  end)

  it("writes its page although a collector throws, and logs it", function()
    local said
    local registry = Registry.new { log = function(_, text) said = text end }
    registry:counter("a_total", "A."):with():inc()
    registry:collect(function() error "boom" end)
    assert.truthy(registry:text():find("a_total 1", 1, true))
    assert.truthy(said:find("boom", 1, true))
  end)

  it("allocates nothing to count, set and observe", function()
    local registry = Registry.new()
    local c, g = registry:counter("a_total", "A."):with(), registry:gauge("b", "B."):with()
    local h = registry:histogram("c_seconds", "C."):with()
    local function work()
      for i = 1, 10000 do
        c:inc()
        g:set(i)
        h:observe(0.02)
      end
    end
    work()
    collectgarbage()
    collectgarbage "stop"
    local before = collectgarbage "count"
    work()
    local grown = collectgarbage "count" - before
    collectgarbage "restart"
    assert.truthy(grown < 1, grown)
  end)
end)

describe("the observer", function()
  it("counts what a runner tells", function()
    local m = metrics.new()
    local heard = 0
    local o = m:observer { settled = function() heard = heard + 1 end }
    o.delivered("q", {})
    o.runner { queue = "q", in_flight = 1, stuck = 2 }
    o.settled("q", "ok", 0.02)
    o.settled("q", "duplicate", 0)
    o.failed("q", { kind = "timeout" })
    o.canary("pay", "v2", false, 0.3)
    o.event("canary_rollback", { route = "pay" })
    o.event("breaker_open", { queue = "q" })
    o.event("copy_failed", { queue = "q", what = "dead letter", error = {} })
    o.event("copy_failed", { queue = "q", what = "retry", error = "x" })
    o.event("reloaded", {})
    assert.equal(2, heard)
    local text = m:text()
    for _, line in ipairs {
      'moonrabbit_messages_delivered_total{queue="q"} 1', 'moonrabbit_messages_in_flight{queue="q"} 1',
      'moonrabbit_messages_settled_total{queue="q",outcome="ok"} 1',
      'moonrabbit_messages_settled_total{queue="q",outcome="duplicate"} 1',
      'moonrabbit_handler_seconds_count{queue="q"} 1', 'moonrabbit_handler_failures_total{queue="q",kind="timeout"} 1',
      'moonrabbit_canary_runs_total{route="pay",version="v2",result="failed"} 1',
      'moonrabbit_canary_rollbacks_total{route="pay"} 1', 'moonrabbit_breaker_open{queue="q"} 1',
      'moonrabbit_copies_failed_total{queue="q",what="dead_letter",then="tried_again"} 1',
      'moonrabbit_copies_failed_total{queue="q",what="retry",then="given_back"} 1',
      'moonrabbit_events_total{event="reloaded"} 1', 'moonrabbit_handlers_stuck{queue="q"} 2',
    } do
      assert.truthy(text:find(line .. "\n", 1, true), line .. "\n" .. text)
    end
  end)
end)

describe("what is in flight", function()
  it("is looked at when the page is written, over all runners of a queue that are left", function()
    local m = metrics.new()
    local old, new = { queue = "q", in_flight = 2, stuck = 1 }, { queue = "q", in_flight = 3, stuck = 0 }
    m:observer().runner(old)
    m:observer().runner(new)
    local function page()
      local text = m:text()
      return text:match 'in_flight{queue="q"} (%d+)', text:match 'stuck{queue="q"} (%d+)'
    end
    assert.same({ "5", "1" }, { page() })
    new.in_flight = 4
    assert.same({ "6", "1" }, { page() })
    old = nil -- luacheck: ignore 311
    collectgarbage()
    collectgarbage()
    assert.same({ "4", "0" }, { page() })
  end)

  it("goes with breakers, which end with their runners", function()
    local m = metrics.new()
    local function runner(state)
      local made = { queue = "q", in_flight = 0, stuck = 0, stopping = false, breaker = state and { state = state } }
      m:observer().runner(made)
      return made
    end
    local function open() return m:text():match 'breaker_open{queue="q"} (%d+)' end
    local old = runner "open"
    m:observer().event("breaker_open", { queue = "q" })
    assert.equal("1", open())
    local new = runner "open" -- as it was carried over
    old.stopping = true
    old.breaker.state = "closed"
    m:observer().event("breaker_closed", { queue = "q" })
    assert.equal("1", open())
    new.stopping = true
    runner(nil) -- a script without one
    assert.equal("0", open())
  end)

  it("goes with what an app publishes", function()
    local m = metrics.new()
    local o = m:observer()
    o.published("shop", 0.01)
    o.published("shop", 0.5, { kind = "unroutable" })
    o.published("shop", 0.5, { kind = "overflow" }) -- was not taken
    local text = m:text()
    for _, line in ipairs {
      'moonrabbit_publishes_total{publisher="shop"} 2', 'moonrabbit_publish_seconds_count{publisher="shop"} 1',
      'moonrabbit_publish_errors_total{publisher="shop",kind="unroutable"} 1',
      'moonrabbit_publish_errors_total{publisher="shop",kind="overflow"} 1',
    } do
      assert.truthy(text:find(line .. "\n", 1, true), line .. "\n" .. text)
    end
  end)
end)

describe("a watched connection", function()
  local function watched(m, opts)
    local other = scripted.start()
    opts = opts or {}
    opts.uri, opts.runtime, opts.log = "amqp://guest:guest@127.0.0.1/", other.runtime, function() end
    local conn = assert(mr.connect(opts))
    finally(function() conn:close(1) end)
    return conn, other, m:watch(conn, "c")
  end

  local function page(m)
    local text = m:text()
    return text:match 'moonrabbit_connections{connection="c"} (%d+)', text:match '_up{connection="c"} (%d+)'
  end

  local function closed(conn)
    mr.run(function()
      while conn:state() ~= "closed" do mr.sleep(0.001) end
      mr.sleep(0)
    end)
  end

  it("leaves the page when it is closed here, and nothing keeps it", function()
    local m = metrics.new()
    local conn = watched(m)
    assert.same({ "1", "1" }, { page(m) })
    assert(conn:close())
    closed(conn)
    assert.is_nil(page(m))
    assert.is_nil(next(m._connections.watched))
  end)

  it("leaves it also where the broker goes in that moment", function()
    local m = metrics.new()
    local conn, other = watched(m)
    other.answers["10.50"] = function()
      return fake.method(0, 10, 50, fake.u16(320) .. fake.short "CONNECTION_FORCED" .. fake.u32(0))
    end
    local _, err = conn:close()
    assert.equal(320, err.code)
    closed(conn)
    assert.is_nil(page(m))
  end)

  it("stays on the page, as one that is not up, when it is lost for good", function()
    local m = metrics.new()
    local conn, other, off = watched(m, { reconnect = false })
    mr.run(function() other:cut() end)
    closed(conn)
    assert.same({ "1", "0" }, { page(m) })
    off()
    assert.is_nil(page(m))
  end)
end)

describe("a measured publisher", function()
  local function shop(m)
    local conn = assert(mr.connect { uri = "amqp://guest:guest@127.0.0.1/", runtime = scripted.start().runtime })
    finally(function() conn:close(1) end)
    return m:publisher(assert(conn:publisher { routing_key = "q", outbox = "memory" }), "shop")
  end

  local function unconfirmed(m) return m:text():match 'publisher_unconfirmed{publisher="shop"} (%d+)' end

  it("leaves the page when it is closed, and what it counted stays", function()
    local m = metrics.new()
    local publisher = shop(m)
    assert(publisher:send_async "x")
    assert.equal("1", unconfirmed(m))
    publisher:close()
    assert.is_nil(unconfirmed(m))
    local text = m:text()
    for _, gauge in ipairs { "publisher_bytes", "publisher_window", "outbox_messages" } do
      assert.is_nil(text:find(gauge, 1, true))
    end
    assert.truthy(text:find('publishes_total{publisher="shop"} 1', 1, true))
    publisher:close()
  end)

  if _VERSION == "Lua 5.4" then
    it("can be closed by Lua", function()
      local m = metrics.new()
      local publisher = shop(m)
      assert(load "local publisher <close> = ...")(publisher)
      assert.is_nil(unconfirmed(m))
      assert.is_false(publisher.channel:is_open())
    end)
  end
end)

describe("the sum of pages", function()
  local function page(n)
    local m = metrics.new()
    local o = m:observer()
    for _ = 1, n do
      o.delivered("a } b", {})
      o.settled("a } b", "ok", 0.25)
    end
    local runner = { queue = "a } b", in_flight = n, stuck = 0 }
    o.runner(runner)
    return (m:text())
  end

  it("is the page of one that did it all, in any order", function()
    assert.equal(page(5), metrics.sum { page(2), page(3) })
    assert.equal(page(5), metrics.sum { page(3), page(2) })
    assert.equal(page(3), metrics.sum { page(3) })
  end)

  it("keeps counters and histograms of who is gone, and no gauge", function()
    local left = metrics.lasting(page(2))
    assert.truthy(left:find("messages_delivered_total", 1, true))
    assert.truthy(left:find("handler_seconds_bucket", 1, true))
    assert.falsy(left:find("in_flight", 1, true))
  end)

  it("does not fall by what adding in another order rounds away", function()
    local function counter(n) return "# TYPE a_total counter\na_total " .. n .. "\n" end
    local function gauge(n) return "# TYPE b gauge\nb " .. n .. "\n" end
    local highest = {}
    local before = metrics.sum({ counter(0.1 + 0.2), counter(0.3), gauge(2) }, highest)
    local after = metrics.sum({ counter(0.1), counter(0.5) }, highest)
    assert.equal(before:match "a_total %S+\n", after:match "a_total %S+\n")
    assert.equal(gauge(1), metrics.sum({ gauge(1) }, highest))
    assert.equal(counter(7), metrics.sum({ counter(7) }, highest))
  end)

  it("takes nonsense for nothing", function()
    assert.equal("", metrics.sum {})
    assert.equal("a 3\n", metrics.sum { "a 1\n}{\nb\n", "a 2" })
  end)
end)

describe("docs/observability.md", function()
  it("has exactly the metrics that there are", function()
    local documented = {}
    for name, kind, labels in slurp("docs/observability.md"):gmatch "\n| `(moonrabbit_[%w_]+)` | (%l+) | ([^|]*) |" do
      documented[name] = kind .. " " .. labels:gsub("[`%s]", "")
    end
    local coded = {}
    for _, each in ipairs(families.list) do coded[each[1]] = each[2] .. " " .. table.concat(each[3], ",") end
    assert.same(coded, documented)
  end)
end)

describe("moonrabbit.log", function()
  local log = require "moonrabbit.log"
  local function lines(opts)
    local out = {}
    opts.write = function(line) out[#out + 1] = line end
    opts.now = function() return 0 end
    return log.new(opts), out
  end

  it("writes one line, whatever the text holds", function()
    local write, out = lines { fields = { app = "orders" } }
    write("warn", "two\nlines\27[2J", { n = 1, text = 'a "b"' })
    assert.same({ '1970-01-01T00:00:00Z warn  two\\nlines\\x1b[2J app=orders n=1 text="a \\"b\\""\n' }, out)
  end)

  it("writes JSON", function()
    local write, out = lines { format = "json" }
    write("error", "x\ny", { n = 1 })
    assert.same({ '{"level":"error","message":"x\\ny","n":1,"time":"1970-01-01T00:00:00Z"}\n' }, out)
  end)

  it("leaves out what is less than its level", function()
    local write, out = lines { level = "warn" }
    write("info", "x")
    write("error", "y")
    assert.equal(1, #out)
  end)

  it("lets no secret through", function()
    local write, out = lines {}
    write("info", "amqp://joe:hunter2@h/ password=hunter2 token: hunter2 Authorization: Bearer hunter2", {
      password = "hunter2", nested = { api_key = "hunter2", uri = "amqps://a:hunter2@h" },
      again = "Basic aHVudGVyMg==",
    })
    assert.falsy(out[1]:find("hunter2", 1, true), out[1])
    assert.falsy(out[1]:find("aHVudGVyMg", 1, true), out[1])
    write("info", "the bank said no: password = hunter2, then: token:hunter2")
    assert.truthy(out[2]:find("the bank said no: password = ***, then: token:***", 1, true), out[2])
    write("info", "amqp://joe:p@hunter2@host/")
    assert.falsy(out[3]:find("hunter2", 1, true), out[3])
  end)

  it("lets no secret through that stands between quotes or begins with a star", function()
    local write, out = lines {}
    for i, text in ipairs {
      '{"password":"hunter2"}', '{"password" : "two hunter2, words", "n": 1}', [[password='it\'s hunter2']],
      [[{\"token\":\"hunter2\"}]], "password=*hunter2", "password: a*hunter2", 'password="hunter2',
    } do
      write("info", text .. " end")
      assert.falsy(out[i]:find("hunter2", 1, true), out[i])
      assert.truthy(out[i]:find("***", 1, true), out[i])
    end
    assert.matches('"n": 1} end\n$', out[2])
  end)

  it("needs no longer for a long word than for many short ones", function()
    local write, out = lines {}
    local before = os.clock()
    write("info", ("a"):rep(30000) .. " password=hunter2 " .. ("b."):rep(15000) .. " amqp://joe:hunter2@h/")
    assert.is_true(os.clock() - before < 5) -- where it begins at every letter: half a minute
    assert.falsy(out[1]:find("hunter2", 1, true))
    assert.truthy(out[1]:find("amqp://***@h/", 1, true))
  end)

  it("blots the password out of each URI of a list, whatever stands before it", function()
    local write, out = lines {}
    write("info", "amqp://joe:hunter2@h1:5671,amqp://joe:hunter3@h2 amqp://h1:5671,amqp://joe:hunter4@h2,"
      .. "amqp://joe@h3,amqp://joe:hunter5@h4/v")
    assert.falsy(out[1]:find "hunter")
    for host = 1, 4 do assert.truthy(out[1]:find("h" .. host, 1, true)) end
  end)

  it("writes a line whatever it is given", function()
    local write, out = lines {}
    local bad = setmetatable({}, { __tostring = function() error "no" end })
    write("info", "x", { bad = bad, fn = print })
    write("info", bad)
    assert.matches("__tostring fails", out[1])
    assert.matches("__tostring fails", out[2])
  end)
end)
