-- The demo's counting: what it calls lost, and what it makes of the shop's files.
package.path = "examples/shop/?.lua;" .. package.path
local count = require "director.count"
local process = require "support.process"
local watch = require "director.watch"

local function set(...)
  local all = {}
  for _, id in ipairs { ... } do all[id] = true end
  return all
end

local function times(...)
  local all = {}
  for _, id in ipairs { ... } do all[id] = (all[id] or 0) + 1 end
  return all
end

local function facts(changes)
  local all = {
    placed = set("1", "2", "3"), unconfirmed = 0, reached = set("1", "2", "3"), books = times("1", "2", "3"),
    mails = times("1", "2", "3"), parked = { orders = {}, payments = {}, mail = {} }, waiting = 0,
    warm_up = { published = 10, delivered = 10 },
  }
  for key, value in pairs(changes or {}) do all[key] = value end
  return all
end

describe("the demo's sum", function()
  it("has nothing to say when all is well", function()
    local sum = count.sum(facts())
    assert.same({}, sum.problems)
    assert.same({}, sum.lost)
    assert.same({ orders = 0, payments = 0, mail = 0 }, sum.lost_by)
  end)

  it("finds what is lost, and where", function()
    local sum = count.sum(facts { reached = set("1", "2"), books = times("1", "2"), mails = times("1") })
    assert.same({ "2", "3" }, sum.lost)
    assert.same({ orders = 1, payments = 0, mail = 1 }, sum.lost_by)
    assert.same({ "2 orders are lost: 2 3" }, sum.problems)
  end)

  it("does not call lost what is parked, and says that it is", function()
    local sum = count.sum(facts {
      reached = set("1", "2"), books = times("1"), mails = times("1"),
      parked = { orders = set "3", payments = set "2", mail = {} },
    })
    assert.same({}, sum.lost)
    assert.same({ "2 orders are still parked" }, sum.problems)
  end)

  it("finds what happened twice", function()
    local sum = count.sum(facts { books = times("1", "2", "2", "3"), mails = times("1", "1", "1", "2", "3") })
    assert.same({ "2" }, sum.paid_twice)
    assert.same({ "1" }, sum.mailed_twice)
    assert.same({ "1 orders were paid twice: 2", "1 orders were mailed twice: 1" }, sum.problems)
  end)

  it("finds what nobody ordered or paid", function()
    local sum = count.sum(facts { books = times("1", "2", "3", "4"), mails = times("1", "2", "3", "5") })
    assert.same({ "1 orders were paid and never placed: 4", "1 orders were mailed and never paid: 5" }, sum.problems)
  end)

  it("counts what the broker still has, and does not take silence for nothing", function()
    assert.same({ "7 messages are still in the shop's queues" }, count.sum(facts { waiting = 7 }).problems)
    local unknown = facts()
    unknown.waiting = nil
    assert.same({ "what is left in the queues could not be counted" }, count.sum(unknown).problems)
  end)

  it("counts publishes without a confirm, and the warm-up", function()
    local sum = count.sum(facts { unconfirmed = 2, warm_up = { published = 10, delivered = 9 } })
    assert.same({ "1 messages of the warm-up are lost", "2 publishes were never confirmed" }, sum.problems)
  end)

  it("names the first few only", function()
    local many = {}
    for i = 1, 9 do many[tostring(i)] = true end
    local sum = count.sum(facts { placed = many, reached = {}, books = {}, mails = {} })
    assert.same({ "9 orders are lost: 1 2 3 4 5 ..." }, sum.problems)
  end)

  it("makes a table no wider than a terminal", function()
    local head, lines = count.table({
      { "payments", 123456, 123456, 123456, 1234, 12, 12, 24, 0 }, { "warm-up", 1, 1, 1, "", "", "", "", 0 },
    }, tostring)
    assert.truthy(#head <= 80)
    assert.equal(#head, #lines[1])
    assert.truthy(lines[1]:find("^  payments +123456 +123456 +123456 +1234 +12 +12 +24 +0$"))
    assert.truthy(lines[2]:find("^  warm%-up +1 +1 +1 +0$"))
  end)
end)

describe("the demo's look at the shop's files", function()
  local folder

  before_each(function()
    folder = os.tmpname()
    os.remove(folder)
    os.execute("mkdir -p " .. folder)
  end)
  after_each(function() os.execute("rm -rf " .. folder) end)

  local function append(name, text)
    local file = assert(io.open(folder .. "/" .. name, "a"))
    file:write(text)
    file:close()
  end

  it("reads on where it stopped, whole lines only", function()
    local w = watch.new(folder)
    w:look()
    append("payments.journal", "delivered 000001 first\ndelivered 000002 ag")
    w:look()
    assert.equal(1, w.payments.delivered)
    append("payments.journal", "ain\nsettled ok\nsettled retry\nevent copy_failed no route\n")
    append("mailbox", "000001\ta@b\tDear\n000001\ta@b\tDear\n")
    w:look()
    w:look()
    assert.equal(2, w.payments.delivered)
    assert.equal(1, w.payments.again)
    assert.same(set("000001", "000002"), w.payments.came)
    assert.equal(1, w:count("payments", "ok"))
    assert.equal(1, w:count("payments", "retry"))
    assert.equal("no route", w:event("copy_failed").why)
    assert.same({ ["000001"] = 2 }, w.mails)
    assert.equal(2, w.mail_count)
  end)

  it("knows what an app has in its hands, and what a killed one took along", function()
    local w = watch.new(folder)
    append("payments.journal", "delivered 1 first\ndelivered 2 first\ndelivered 3 first\nsettled ok\n")
    w:look()
    assert.equal(2, w:in_hand "payments")
    assert.equal(2, w:write_off "payments")
    assert.equal(0, w:in_hand "payments")
    append("payments.journal", "delivered 2 again\n")
    w:look()
    assert.equal(1, w:in_hand "payments")
  end)
end)

describe("the shop's orders", function()
  local path = process.slurp
  local function load_order(name) return assert(loadfile("examples/shop/" .. name .. ".lua"))() end

  it("has the files that the demo deploys", function()
    for _, name in ipairs { "orders", "payments", "mail", "order", "order_mended", "books", "journal", "shop" } do
      assert.truthy(path("examples/shop/" .. name .. ".lua"), name)
    end
  end)

  it("cannot read old tills, until it is mended", function()
    local text = '{"id":"7","cents":"12,50"}'
    local placed, problem = load_order "order".read(text)
    assert.is_nil(placed)
    assert.truthy(problem:find("no number", 1, true))
    assert.equal(1250, load_order "order_mended".read(text).cents)
    assert.is_nil((load_order "order_mended".read '{"id":"7","cents":"a lot"}'))
    assert.is_nil((load_order "order_mended".read "no JSON"))
  end)
end)
