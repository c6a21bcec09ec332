-- moonrabbit top, without a terminal and a network: reading pages, what they come to, and the lines that show it.
local figures = require "moonrabbit.cli.top.figures"
local mr = require "moonrabbit"
local read = require "moonrabbit.metrics.read"
local screen = require "moonrabbit.cli.top.screen"
local sources = require "moonrabbit.cli.top.sources"
local values = require "moonrabbit.cli.values"

describe("metrics.read", function()
  it("reads what the registry writes", function()
    local m = mr.metrics.new()
    local o = m:observer()
    o.delivered('a "b" \\ c\nd } e', {})
    o.settled("q", "ok", 0.25)
    local page = assert(read.page(m:text()))
    assert.same({ { labels = { queue = 'a "b" \\ c\nd } e' }, value = 1 }, { labels = { queue = "q" }, value = 0 } },
      page.moonrabbit_messages_delivered_total)
    assert.equal(0.25, page.moonrabbit_handler_seconds_sum[2].value)
    assert.equal("+Inf", page.moonrabbit_handler_seconds_bucket[#page.moonrabbit_handler_seconds_bucket].labels.le)
  end)

  it("reads what others write", function()
    local page = assert(read.page('# HELP a b\r\n\n# any words\n'
      .. '  a{ x = "1" , y="2", } 3 1700000000000\r\nb 1e3\nc{} +Inf\n'
      .. 'd 1 # {trace_id="x"} 1\n# EOF'))
    assert.same({ { labels = { x = "1", y = "2" }, value = 3 } }, page.a)
    assert.equal(1000, page.b[1].value)
    assert.equal(math.huge, page.c[1].value)
    assert.equal(1, page.d[1].value)
    assert.same({}, read.page "")
  end)

  it("names the line that is no metric", function()
    for line, text in pairs {
      ["<!DOCTYPE html>"] = "<!DOCTYPE html>", ["a"] = "a", ["a x"] = "a x", ["a{b=1} 2"] = "a{b=1} 2",
      ['a{b="1} 2'] = 'a{b="1} 2', ['a{b="1"'] = 'a{b="1"', ["{} 1"] = "{} 1", ["a 1 x"] = "a 1 x",
      ['a{b="1\\'] = 'a{b="1\\', ["\27[2J"] = "?[2J", [("x"):rep(1000)] = ("x"):rep(40),
    } do
      local page, problem = read.page("ok 1\n" .. line)
      assert.is_nil(page, line)
      assert.equal(("line 2 is no metric: '%s'"):format(text), problem)
    end
  end)
end)

describe("top's addresses", function()
  it("are hosts with ports, and maybe paths", function()
    local function parts(text)
      local a = assert(sources.address(text))
      return { a.host, a.port, a.path, a.tls ~= nil, a.label }
    end
    assert.same({ "127.0.0.1", 9419, "/metrics", false, "127.0.0.1:9419" }, parts "http://127.0.0.1")
    assert.same({ "h", 80, "/metrics", false, "h:80" }, parts "h:80/")
    assert.same({ "::1", 81, "/x", true, "[::1]:81" }, parts "https://[::1]:81/x")
    for _, text in ipairs { "", "http://", "amqp://h", "h:0", "h:65536", "h:x", "h/a b", "u:p@h", "h\n" } do
      assert.is_nil(sources.address(text), text)
    end
    assert.is_nil(values.place "a b")
  end)
end)

local function page(text) return assert(read.page(text)) end
local function look(at, text) return { at = at, page = page(text) } end

describe("top's figures", function()
  local before = look(100, [[
moonrabbit_messages_delivered_total{queue="a"} 100
moonrabbit_messages_settled_total{queue="a",outcome="ok"} 90
moonrabbit_messages_settled_total{queue="a",outcome="retry"} 5
moonrabbit_handler_seconds_bucket{queue="a",le="0.1"} 50
moonrabbit_handler_seconds_bucket{queue="a",le="1"} 90
moonrabbit_handler_seconds_bucket{queue="a",le="+Inf"} 90
moonrabbit_publishes_total{publisher="p"} 10]])
  local now = look(110, [[
moonrabbit_messages_delivered_total{queue="a"} 200
moonrabbit_messages_settled_total{queue="a",outcome="ok"} 150
moonrabbit_messages_settled_total{queue="a",outcome="retry"} 25
moonrabbit_messages_settled_total{queue="a",outcome="dead_letter"} 10
moonrabbit_handler_failures_total{queue="a",kind="error"} 20
moonrabbit_handler_failures_total{queue="a",kind="timeout"} 10
moonrabbit_handler_seconds_bucket{queue="a",le="0.1"} 100
moonrabbit_handler_seconds_bucket{queue="a",le="1"} 190
moonrabbit_handler_seconds_bucket{queue="a",le="+Inf"} 190
moonrabbit_messages_in_flight{queue="a"} 7
moonrabbit_publishes_total{publisher="p"} 60
moonrabbit_publish_errors_total{publisher="p",kind="nacked"} 5
moonrabbit_publisher_unconfirmed{publisher="p"} 3
moonrabbit_publisher_window{publisher="p"} 100
moonrabbit_connections{connection="c"} 2
moonrabbit_connection_up{connection="c"} 1
moonrabbit_ladder_waiting{ladder="l",step="1s"} 3
moonrabbit_ladder_waiting{ladder="l",step="5s"} 4
moonrabbit_ladder_orphans{ladder="l"} 2]])

  it("are rates between two looks, latencies of what came between them, and counts of now", function()
    local found = figures.all { { before = before, now = now } }
    assert.same({ {
      queue = "a", delivered_rate = 10, ok_rate = 6, retry_rate = 2, dead_letter_rate = 1, failed_rate = 3,
        in_flight = 7,
      retries = 25, dead_letters = 10, p50 = 0.1, p99 = found.queues[1].p99,
    } }, found.queues)
    assert.is_true(math.abs(found.queues[1].p99 - 0.982) < 1e-9)
    assert.same({ { publisher = "p", published_rate = 5, error_rate = 0.5, unconfirmed = 3, window = 100,
      published = 60 } }, found.publishers)
    assert.same({ { ladder = "l", waiting = 7, orphans = 2 } }, found.ladders)
    assert.same({ total = 2, up = 1 }, found.connections)
  end)

  it("are no rates after a single look", function()
    local found = figures.all { { now = now } }
    assert.is_nil(found.queues[1].delivered_rate)
    assert.equal(7, found.queues[1].in_flight)
    assert.same(figures.all { { before = now, now = now } }, found)
  end)

  it("add several processes up, but for what the broker holds", function()
    local found = figures.all { { before = before, now = now }, { before = before, now = now } }
    assert.equal(20, found.queues[1].delivered_rate)
    assert.equal(14, found.queues[1].in_flight)
    assert.equal(0.1, found.queues[1].p50)
    assert.equal(7, found.ladders[1].waiting)
    assert.equal(4, found.connections.total)
  end)

  it("take a counter that has fallen for one that began anew", function()
    local found = figures.all { { before = { at = 0, page = now.page }, now = { at = 10, page = before.page } } }
    assert.equal(10, found.queues[1].delivered_rate)
    assert.is_true(found.queues[1].p50 < 0.1)
  end)

  it("join what the broker says of the queues", function()
    local found = figures.all({ { now = now } }, {
      { name = "a", messages_ready = 5, messages_unacknowledged = 7, consumers = 1,
        message_stats = { publish_details = { rate = 1.5 }, deliver_get_details = { rate = 2 } } },
      { name = "b", messages_ready = 1, message_stats = {} }, { name = "c", message_stats = "lie",
        messages_ready = {} },
      { messages_ready = 1 },
    })
    assert.equal(3, #found.queues)
    local a = found.queues[1]
    assert.same({ 7, 5, 7, 1, 1.5, 2 }, { a.in_flight, a.ready, a.unacked, a.consumers, a.published_rate,
      a.taken_rate })
    assert.same({ queue = "b", ready = 1 }, found.queues[2])
    assert.same({ queue = "c" }, found.queues[3])
  end)

  it("survive numbers that are none", function()
    local odd = look(110, [[
moonrabbit_messages_delivered_total{queue="a"} NaN
moonrabbit_messages_in_flight{queue="a"} +Inf
moonrabbit_handler_seconds_bucket{queue="a",le="x"} 1
moonrabbit_handler_seconds_bucket{queue="a",le="1"} NaN
moonrabbit_handler_seconds_bucket{queue="a"} 3
moonrabbit_messages_delivered_total 3
moonrabbit_connections NaN]])
    local found = figures.all { { before = before, now = odd }, { before = odd, now = before } }
    assert.is_nil(found.connections.total)
    assert.equal(1, #found.queues)
    assert.is_nil(found.queues[1].in_flight)
  end)

  it("estimate quantiles as Prometheus does", function()
    local buckets = { [1] = 10, [2] = 20, [math.huge] = 20 }
    assert.equal(1, figures.quantile(buckets, 0.5))
    assert.equal(0.5, figures.quantile(buckets, 0.25))
    assert.equal(2, figures.quantile(buckets, 1))
    assert.equal(2, figures.quantile({ [2] = 0, [math.huge] = 5 }, 0.5))
    assert.is_nil(figures.quantile({ [1] = 0, [math.huge] = 0 }, 0.5))
    assert.is_nil(figures.quantile({}, 0.5))
  end)

  it("sort, what is not known last", function()
    local function order(key, reverse)
      local rows = { { queue = "b", ready = 1 }, { queue = "a", ready = 1 }, { queue = "c" }, { queue = "d",
        ready = 9 } }
      local names = {}
      for i, row in ipairs(figures.sort(rows, key, reverse)) do names[i] = row.queue end
      return table.concat(names)
    end
    assert.equal("dabc", order("ready", false))
    assert.equal("abdc", order("ready", true))
    assert.equal("abcd", order("queue", false))
    assert.equal("dcba", order("queue", true))
    for _, key in ipairs(figures.sort_order) do assert.truthy(figures.sort_keys[key]) end
  end)
end)

describe("top's screen", function()
  local function view(fields)
    local all = {
      time = "12:00:00", every = 2, metrics = { { name = "127.0.0.1:9419", looks = 1 } }, sort = "in", reverse = false,
      keys = true, width = 100, height = 24,
      figures = { queues = {}, publishers = {}, ladders = {}, connections = {} },
    }
    for name, value in pairs(fields) do all[name] = value end
    return screen.lines(all)
  end

  local function texts(lines)
    local all = {}
    for i, line in ipairs(lines) do all[i] = line.text end
    return all
  end

  local function columns_of(text)
    local _, n = text:gsub("[^\128-\191]", "")
    return n
  end

  it("shows numbers that are short and durations that are readable", function()
    local shown = {}
    for i, n in ipairs { 0, 0.04, 0.44, 5, 9.5, 12.4, 9999, 10000, 123456, 4500000, 2e9,
      -5 } do shown[i] = screen.number(n) end
    assert.same({ "0", "0.1", "0.4", "5", "9.5", "12", "9999", "10.0k", "123.5k", "4.5M", "2000M", "-5" }, shown)
    shown = {}
    for i, n in ipairs { 0.0004, 0.0123, 0.25, 1.5, 60 } do shown[i] = screen.duration(n) end
    assert.same({ "0.4ms", "12ms", "250ms", "1.5s", "60s" }, shown)
    assert.same({ "-", "-" }, { screen.number(nil), screen.duration(nil) })
  end)

  it("cuts text to columns, wide characters included", function()
    assert.equal("abc  ", screen.fit("abc", 5))
    assert.equal("  abc", screen.fit("abc", 5, true))
    assert.equal("abcde", screen.fit("abcde", 5))
    assert.equal("abcd…", screen.fit("abcdef", 5))
    assert.equal("äöü…", screen.fit("äöüßä", 4))
    assert.equal("月… ", screen.fit("月兎月", 4))
    assert.equal("…", screen.fit("abc", 1))
    assert.equal("", screen.fit("abc", 0))
  end)

  it("lets no name command the terminal", function()
    assert.equal("a?[2Jb?", screen.clean "a\27[2Jb\n")
    assert.equal("?x", screen.clean "\194\155x")
    assert.equal("???", screen.clean "\200\1\200")
    local lines = view { figures = { queues = { { queue = "q\27]0;x\7" } }, publishers = { { publisher = "\27c" } },
      ladders = { { ladder = "\27c" } }, connections = {} }, metrics = { { name = "x", looks = 1,
        problem = "\27[2J" } } }
    for _, line in ipairs(lines) do assert.falsy(line.text:find("%c"), line.text) end
  end)

  it("fits every width and height", function()
    local queues = {}
    for i = 1, 50 do queues[i] = { queue = ("a rather long name of a queue %d"):format(i), ready = i,
      in_flight = 1e7 } end
    local publishers = {}
    for i = 1, 9 do publishers[i] = { publisher = "p" .. i } end
    local found = { queues = queues, publishers = publishers, ladders = {}, connections = { total = 2, up = 1 } }
    for _, width in ipairs { 1, 5, 20, 40, 79, 80, 120, 300 } do
      for _, height in ipairs { 1, 5, 14, 24, 100 } do
        local lines = view { width = width, height = height, figures = found }
        assert.is_true(#lines <= height, #lines .. " lines of " .. height)
        for _, line in ipairs(lines) do assert.is_true(columns_of(line.text) <= width, line.text) end
      end
    end
  end)

  it("drops columns that have no room, the least important first", function()
    local found = { queues = { { queue = "orders", ready = 5, delivered_rate = 3 } }, publishers = {}, ladders = {},
      connections = {} }
    local narrow, wide = texts(view { width = 36, figures = found }), texts(view { width = 120, figures = found })
    assert.truthy(table.concat(narrow, "\n"):find("QUEUE +%*IN/s RETRY/s +READY"), table.concat(narrow, "\n"))
    assert.truthy(table.concat(wide,
      "\n"):find("QUEUE +%*IN/s +OK/s +RETRY/s +DEAD/s +FAIL/s +P50 +P99 +FLIGHT +READY +UNACKED"
      .. " +PUB/s +CONS"), table.concat(wide, "\n"))
  end)

  it("says how many queues it has no room for", function()
    local queues = {}
    for i = 1, 30 do queues[i] = { queue = "q" .. i } end
    local all = texts(view { height = 20, figures = { queues = queues, publishers = {}, ladders = {},
      connections = {} } })
    assert.equal(20, #all)
    local more = tonumber(all[19]:match "^… and (%d+) more")
    assert.equal(30 - (18 - 5), more)
    assert.equal(36, #view { height = false, keys = false, figures = { queues = queues, publishers = {}, ladders = {},
      connections = {} } } + 1)
  end)

  it("says what is away, and marks what is not well", function()
    local lines = view {
      metrics = { { name = "a:1", looks = 3, problem = "connection refused" }, { name = "b:1", looks = 0 } },
      management = { name = "c:1", looks = 1 }, note = "a note",
      figures = {
        queues = { { queue = "q", dead_letter_rate = 1 }, { queue = "r", breaker_open = 1 }, { queue = "s" } },
        publishers = { { publisher = "p", error_rate = 1 } }, ladders = { { ladder = "l", waiting = 3, stuck = 1,
          orphans = 0 } },
        connections = { total = 2, up = 2, blocked = 1 },
      },
    }
    local ill, all = {}, table.concat(texts(lines), "\n")
    for _, line in ipairs(lines) do
      if line.ill then ill[#ill + 1] = line.text:match "^%S+" end
    end
    assert.same({ "metrics", "connections", "publisher", "retries", "q", "r" }, ill)
    for _, words in ipairs { "a:1: connection refused", "b:1: asking", "management    c:1", "a note", "3 wait, 1 stuck",
      "(breaker open)", "1 blocked" } do
      assert.truthy(all:find(words, 1, true), words .. "\n" .. all)
    end
  end)
end)
