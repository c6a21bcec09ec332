-- The bookkeeping of `make chaos`: what it counts must be what happened, above all what was lost.
local account = require "chaos.account"
local ledger = require "chaos.ledger"
local plot = require "chaos.plot"
local report = require "chaos.report"

local function entries(list)
  local made = {}
  for i, one in ipairs(list) do
    made[i] = { at = one[1], kind = one[2], queue = one[3] or "q", serial = one[4] or 0, text = one[5] or "" }
  end
  return made
end

describe("the chaos harness", function()
  it("counts what was confirmed and never delivered", function()
    local published = entries { { 1, "confirmed", "q", 1 }, { 2, "confirmed", "q", 2 }, { 3, "failed", "q", 3 },
      { 4, "confirmed", "q", 4 }, { 4, "confirmed", "other", 9 } }
    local consumed = entries { { 1, "delivered", "q", 1 }, { 2, "delivered", "q", 4 }, { 3, "delivered", "q", 3 },
      { 4, "delivered", "q", 4 }, { 4, "delivered", "q", 4 }, { 5, "delivered", "other", 2 } }
    local sums = account.of("q", published, consumed, 0, 10)
    assert.equal(3, sums.confirmed)
    assert.equal(3, sums.delivered)
    assert.equal(1, sums.lost)
    assert.same({ 2 }, sums.missing)
    assert.equal(2, sums.duplicated)
    assert.equal(1, sums.out_of_order)
    assert.equal(1, sums.failed)
  end)

  it("holds an outbox to what it took", function()
    local sums = account.of("q", entries { { 1, "sent", "q", 1 }, { 1, "sent", "q", 2 }, { 2, "confirmed", "q", 1 } },
      entries { { 3, "delivered", "q", 1 } }, 0, 10)
    assert.equal(1, sums.confirmed)
    assert.same({ 2 }, sums.missing)
  end)

  it("measures the longest gap that the fault lies in or before", function()
    local function gap(times, from, to) return (account.gap(times, from, to)) end
    assert.is_near(4, gap({ 1, 2, 3, 7, 8 }, 2.5, 9), 1e-9)
    assert.is_near(5, gap({ 1, 2 }, 5, 10), 1e-9)
    assert.is_near(3, gap({ 6, 9, 20 }, 5, 10), 1e-9)
  end)

  it("tells when the fault was noticed, and how long the client took to be back", function()
    local published = entries { { 1, "event", "q", 0, "recovering early" }, { 5.25, "event", "q", 0, "open x" },
      { 6, "event", "q", 0, "recovering x" }, { 6.1, "event", "q", 0, "recovering y" },
      { 6.25, "event", "q", 0, "open y" }, { 6.3, "event", "other", 0, "open y" }, { 6.5, "confirmed", "q", 3 },
      { 7, "event", "q", 0, "open y" } }
    local consumed = entries { { 5.5, "event", "q", 0, "cancelled" }, { 5.2, "event", "other", 0, "cancelled" } }
    local sums = account.of("q", published, consumed, 5, 10)
    assert.is_near(0.5, sums.detect, 1e-9)
    assert.is_near(0.25, sums.back, 1e-9)
    assert.is_near(0.5, sums.failover, 1e-9)
    published[#published + 1] = { at = 12, kind = "event", queue = "other", serial = 0, text = "closed by itself" }
    sums = account.of("other", published, {}, 5, 10)
    assert.is_nil(sums.detect)
    assert.is_nil(sums.failover)
    assert.is_nil(sums.back)
  end)

  it("reads a ledger while it is written, and no half lines", function()
    local path = os.tmpname()
    local book, reader = ledger.open(path), ledger.follow(path)
    book:write("confirmed", "q", 7)
    book:write("event", "q", 0, "two\nlines\tand a tab")
    reader:read()
    assert.equal(2, #reader.entries)
    assert.equal(7, reader.entries[1].serial)
    assert.equal("two lines and a tab", reader.entries[2].text)
    book.file:write "1.5\tdelivered\tq"
    assert.equal(2, #reader:read().entries)
    book.file:write "\t8\t\n"
    assert.equal(8, reader:read().entries[3].serial)
    assert.equal(1, reader:counted("delivered", "q"))
    os.remove(path)
  end)

  local sums = { queue = "quorum", name = "q-1", detect = 0.0123, publish_gap = 1.5, deliver_gap = 2, confirmed = 10,
    delivered = 10, lost = 0, duplicated = 1, out_of_order = 0, failed = 0, missing = {} }

  it("writes the results as JSON and as a table", function()
    local rows = { report.row({ name = 'kill "-9"' }, sums) }
    local cjson = require "cjson"
    local decoded = cjson.decode(report.json(rows))
    assert.equal('kill "-9"', decoded[1].fault)
    assert.equal(12, decoded[1].detect_ms)
    assert.equal(1500, decoded[1].publish_gap_ms)
    assert.same({ cjson.null, cjson.null }, { decoded[1].failover_ms, decoded[1].back_ms })
    assert.equal(0, decoded[1].out_of_order)
    local line = '| kill "-9" | quorum | 12 | – | – | 1500 | 2000 | 10 | 10 | 0 | 1 | 0 |'
    assert.is_truthy(report.table(rows):find(line, 1, true))
    assert.same({}, cjson.decode(report.json {}))
  end)

  it("does not pass what lost something, failed or gave nothing", function()
    local function problems(fault, row, told)
      local all = {}
      for key, value in pairs(sums) do all[key] = value end
      for key, value in pairs(row) do all[key] = value end
      return report.problems { fault = fault, rows = { all }, problems = told or {} }
    end
    assert.same({}, problems({}, {}))
    assert.matches("q%-1: 2 confirmed messages were lost, the first of them number 5",
      problems({}, { lost = 2, missing = { 5, 6 } })[1])
    assert.matches("3 publishes ended as failed", problems({}, { failed = 3 })[1])
    assert.matches("it died", problems({}, {}, { "it died" })[1])
    assert.matches("no results", report.problems({ fault = {}, rows = {}, problems = {} })[1])
    assert.same({}, problems({ loses = true }, { lost = 2, missing = { 5, 6 } }))
    assert.matches("would not notice a loss", problems({ loses = true }, {})[1])
  end)

  it("has a median", function()
    assert.is_nil(report.median {})
    assert.equal(3, report.median { 5, 1, 3 })
    assert.equal(2.5, report.median { 1, 4, 2, 3 })
  end)

  it("draws its timeline as well-formed XML", function()
    local book = { entries = entries { { 9, "confirmed", "q-1", 1 }, { 11, "delivered", "q-1", 1 } } }
    local svg = plot.svg { { fault = { name = "a < b & c" }, began = 10, healed = 12, ended = 14, rows = { sums },
      publisher = { book = book }, consumer = { book = book } } }
    assert.matches("^<svg", svg)
    assert.matches("a &lt; b &amp; c", svg, 1, true)
    local open, closed = select(2, svg:gsub("<%a", "")), select(2, svg:gsub("/>", "")) + select(2, svg:gsub("</", ""))
    assert.equal(open, closed)
  end)
end)
