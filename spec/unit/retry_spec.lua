-- Retry policies, steps, and what is kept of the broker's deaths: all of it without a broker.
local retry = require "moonrabbit.app.retry"
local steps = require "moonrabbit.app.steps"
local deaths = require "moonrabbit.app.deaths"

local msg = { headers = {}, properties = {} }
local failure = { message = "no", kind = "error" }

-- What a policy says after each attempt, until it ends.
local function delays(policy, most, err)
  local list = {}
  for attempt = 1, most or 20 do
    local delay = policy(msg, err or failure, attempt)
    if not delay then break end
    list[attempt] = delay
  end
  return list
end

describe("retry policies", function()
  it("wait as they are told, and end", function()
    assert.same({ 5, 5, 5 }, delays(retry.constant { delay = 5, attempts = 4 }))
    assert.same({ 1, 3, 5, 6, 6 }, delays(retry.linear { first = 1, step = 2, max = 6, attempts = 6 }))
    assert.same({ 2, 4, 6, 8 }, delays(retry.linear { first = 2 }))
    assert.same({ 1, 2, 4, 8 }, delays(retry.exponential()))
    assert.same({ 1, 10, 60, 60 }, delays(retry.exponential { first = 1, factor = 10, max = 60 }))
    assert.same({ 1, 5, 30 }, delays(retry.steps { 1, 5, 30 }))
    assert.same({ 1, 5, 5, 5 }, delays(retry.steps { 1, 5, attempts = 5 }))
    assert.same({}, delays(retry.none()))
    assert.equal(100, #delays(retry.constant { delay = 0, attempts = math.huge }, 100))
  end)

  it("never grow beyond what a wait queue can hold", function()
    local policy = retry.exponential { first = 1, factor = 10, attempts = math.huge }
    assert.equal(retry.LONGEST, policy(msg, failure, 400))
    assert.equal(retry.LONGEST, policy(msg, failure, 1e6))
  end)

  it("do not retry what is permanent", function()
    local policies = { retry.constant { delay = 1 }, retry.by_error { otherwise = retry.constant { delay = 1 } } }
    for _, policy in ipairs(policies) do
      assert.same({}, delays(policy, 5, { message = "no", kind = "permanent", permanent = true }))
    end
  end)

  it("spread delays by jitter", function()
    local function range(kind)
      local policy = retry.constant { delay = 10, jitter = kind }
      local list = {}
      for i, x in ipairs { 0, 0.5, 1 - 1e-12 } do
        policy.random = function() return x end
        list[i] = math.floor(policy(msg, failure, 1) * 1000 + 0.5) / 1000
      end
      return list
    end
    assert.same({ 0, 5, 10 }, range "full")
    assert.same({ 5, 7.5, 10 }, range "equal")
    assert.same({ 8, 10, 12 }, range(0.2))
    assert.same({ 10, 10, 10 }, range "none")
    local capped = retry.constant { delay = 10, jitter = 0.5, max = 11 }
    capped.random = function() return 0.99 end
    assert.equal(11, capped(msg, failure, 1))
  end)

  it("give up some time after the first failure", function()
    local policy = retry.constant { delay = 1, attempts = math.huge, within = 60 }
    local late = { headers = { ["moonrabbit-first-failure"] = 1000 }, properties = {} }
    policy.now = function() return 1060 end
    assert.equal(1, policy(late, failure, 7))
    policy.now = function() return 1061 end
    assert.is_nil(policy(late, failure, 8))
    assert.equal(1, policy(msg, failure, 1))
  end)

  it("choose by the error", function()
    local policy = retry.by_error {
      { kind = "timeout", retry.constant { delay = 1 } },
      { match = "^dead%w+", retry.constant { delay = 2 } },
      { temporary = false, retry.none() },
      { when = function(err, m) return err.value == 429 and m == msg end, retry.constant { delay = 3 } },
      { kind = "error", match = "both", function() return 4 end },
      otherwise = retry.constant { delay = 5 },
    }
    local function ask(err) return policy(msg, err, 1) end
    assert.equal(1, ask { kind = "timeout", message = "deadlock" })
    assert.equal(2, ask { kind = "error", message = "deadlock found" })
    assert.equal(5, ask { kind = "error", message = "a deadlock" })
    assert.is_nil(ask { kind = "error", message = "x", value = { temporary = false } })
    assert.equal(5, ask { kind = "error", message = "x", value = { temporary = true } })
    assert.equal(3, ask { kind = "error", message = "x", value = 429 })
    assert.equal(4, ask { kind = "error", message = "both" })
    assert.equal(5, ask { kind = "other", message = "both" })
    assert.is_nil(retry.by_error {} (msg, failure, 1))
  end)

  it("print their timetable", function()
    local policy = retry.exponential { first = 1, factor = 2, max = 5, attempts = 5, jitter = "equal" }
    assert.same({
      { attempt = 1, least = 0.5, most = 1, after = 1 }, { attempt = 2, least = 1, most = 2, after = 3 },
      { attempt = 3, least = 2, most = 4, after = 7 }, { attempt = 4, least = 2.5, most = 5, after = 12 },
    }, policy:timetable())
    assert.equal("exponential from 1 s by 2, at most 5 s, 5 attempts, jitter equal", tostring(policy))
    assert.equal("steps 1, 5 s, for ever", tostring(retry.steps { 1, 5, attempts = math.huge }))
    assert.equal(20, #retry.constant { delay = 1, attempts = math.huge }:timetable())
    assert.same({}, retry.none():timetable())
    assert.equal("no retry", tostring(retry.none()))
    local by_error = retry.by_error { { kind = "timeout", function() end }, otherwise = policy }
    assert.equal("kind timeout: a function of yours; otherwise: " .. tostring(policy), tostring(by_error))
    assert.same(policy:timetable(), by_error:timetable())
    assert.same({}, retry.by_error { otherwise = function() end }:timetable())
  end)

  local function throws(what, fn)
    local ok, err = pcall(fn)
    assert.is_false(ok)
    assert.truthy(tostring(err):find(what, 1, true), tostring(err))
    assert.truthy(tostring(err):find("retry_spec.lua", 1, true), tostring(err))
  end

  it("refuse nonsense where it is written", function()
    throws("'delay' must be a number of seconds", function() retry.constant { delay = -1 } end)
    throws("'delay' must be a number of seconds", function() retry.constant { delay = 0 / 0 } end)
    throws("'delay' must be a number of seconds", function() retry.constant { delay = math.huge } end)
    throws("'delay' must be a number of seconds", function() retry.constant { delay = "5" } end)
    throws("option 'delay' is missing", function() retry.constant {} end)
    throws("options must be a table", function() retry.constant(5) end)
    throws("did you mean 'attempts'", function() retry.constant { delay = 1, atempts = 3 } end)
    throws("a number of attempts", function() retry.constant { delay = 1, attempts = 0 } end)
    throws("a number of attempts", function() retry.constant { delay = 1, attempts = 1.5 } end)
    throws('"full", "equal", "none"', function() retry.constant { delay = 1, jitter = "some" } end)
    throws('"full", "equal", "none"', function() retry.constant { delay = 1, jitter = 1.1 } end)
    throws("'first' is missing", function() retry.linear { step = 1 } end)
    throws("1 or more", function() retry.exponential { factor = 0.5 } end)
    throws("'max' must be", function() retry.exponential { max = -1 } end)
    throws("list of delays", function() retry.steps {} end)
    throws("list of delays", function() retry.steps(5) end)
    throws("delay 2 must be", function() retry.steps { 1, -5 } end)
    throws("delay 2 is missing (nil)", function() retry.steps { 1, nil, 30 } end)
    throws("delay 3 is missing (nil)", function() retry.steps { 1, 5, [1.5] = 2 } end)
    throws("rule 2 is missing (nil)", function()
      retry.by_error { { kind = "x", retry.none() }, nil, { kind = "y", retry.none() } } -- of a misspelt name
    end)
    throws("unknown option 'jiter'", function() retry.steps { 1, jiter = 1 } end)
    throws("rule 1 has no policy", function() retry.by_error { { kind = "x" } } end)
    throws("rule 1 has no condition", function() retry.by_error { { retry.none() } } end)
    throws("malformed", function() retry.by_error { { match = "[a", retry.none() } } end)
    throws("unknown field 'default'", function() retry.by_error { default = retry.none() } end)
    throws("'otherwise' must be a policy", function() retry.by_error { otherwise = 5 } end)
  end)
end)

describe("what a policy decides", function()
  it("is a delay, or why there is none", function()
    assert.equal(5, (retry.decide(function() return 5 end, msg, failure, 1)))
    local delay, reason, err = retry.decide(function() return nil end, msg, failure, 1)
    assert.is_nil(delay)
    assert.equal("attempts", reason)
    assert.equal(failure, err)
    local permanent = { message = "x", permanent = true }
    delay, reason, err = retry.decide(function() return 5 end, msg, permanent, 1)
    assert.is_nil(delay)
    assert.equal("permanent", reason)
    assert.equal(permanent, err)
    delay, reason = retry.decide(nil, msg, failure, 1)
    assert.is_nil(delay)
    assert.equal("no retry", reason)
  end)

  it("is a failure of its own when it throws or returns nonsense", function()
    local nonsense = {
      function() error "oops" end, function() error { code = 1 } end, function() return -1 end,
      function() return 0 / 0 end, function() return math.huge end, function() return "5" end,
      function() return true end, function() return {} end, function() return false end, function() return 1e9 end,
    }
    for _, policy in ipairs(nonsense) do
      local delay, reason, err = retry.decide(policy, msg, failure, 1)
      assert.is_nil(delay)
      assert.equal("retry policy", reason)
      assert.equal("policy", err.kind)
      assert.is_true(err.permanent)
      assert.truthy(err.message:find("the failure it was asked about: no", 1, true), err.message)
    end
    local _, _, err = retry.decide(nonsense[1], msg, failure, 1)
    assert.truthy(err.message:find("threw: .*oops"), err.message)
  end)
end)

describe("steps", function()
  it("are never shorter than the delay, nor 10 % longer", function()
    local seed = 1
    for _ = 1, 2000 do
      seed = seed * 16807 % 2147483647
      local delay = 0.1 * 10 ^ (seed / 2147483647 * 7.6)
      local step = steps.of(delay)
      assert.is_true(step >= delay * 1000 - 1e-5, delay)
      assert.is_true(step <= delay * 1100 + 1, delay)
    end
  end)

  it("are few, and whole numbers", function()
    local seen, count = {}, 0
    for i = 0, 10000 do
      local step = steps.of(0.1 * 10 ^ (i / 10000 * 2))
      assert.equal(math.floor(step), step)
      if not seen[step] then count = count + 1 end
      seen[step] = true
    end
    assert.equal(67, count)
  end)

  it("have the delays that people like", function()
    for _, delay in ipairs { 0.1, 0.2, 0.5, 1, 1.5, 2, 3, 5, 10, 15, 20, 30, 60, 120, 300, 600, 900, 1800, 3600 } do
      assert.equal(delay * 1000, steps.of(delay), delay)
    end
    assert.equal(100, steps.of(0))
    assert.equal(1000, steps.of(0.951))
    assert.is_true(steps.of(steps.LONGEST) < 2 ^ 32)
    assert.is_nil(steps.of(steps.LONGEST + 1))
    assert.equal("5s", steps.text(5000))
    assert.equal("1500ms", steps.text(1500))
  end)

  it("of a list are the user's", function()
    assert.equal(5000, steps.of_list({ 1, 5, 60 }, 1.1))
    assert.equal(1000, steps.of_list({ 1, 5, 60 }, 1))
    assert.is_nil(steps.of_list({ 1, 5, 60 }, 61))
  end)
end)

describe("deaths", function()
  local function death(queue, reason, count) return { queue = queue, reason = reason, count = count } end

  it("are moved, without those of the ladder's own queues", function()
    local moved, any = deaths.merge(nil, {
      ["x-death"] = { death("app.wait.5s", "expired", 1), death("q", "rejected", 2) },
      ["x-first-death-queue"] = "q", ["x-first-death-reason"] = "rejected", ["x-first-death-exchange"] = "",
      ["x-last-death-queue"] = "app.wait.5s", ["x-last-death-reason"] = "expired",
    }, 32, "app")
    assert.is_true(any)
    assert.same({
      ["x-death"] = { death("q", "rejected", 2) },
      ["x-first-death-queue"] = "q", ["x-first-death-reason"] = "rejected", ["x-first-death-exchange"] = "",
    }, moved)
    moved, any = deaths.merge(nil, { ["x-death"] = { death("app.wait.5s", "expired", 1) },
      ["x-first-death-queue"] = "app.wait.5s" }, 32, "app")
    assert.is_nil(moved)
    assert.is_true(any)
    moved, any = deaths.merge({ kept = true }, {}, 32, "app")
    assert.is_nil(moved)
    assert.is_false(any)
  end)

  it("are joined with those of earlier trips", function()
    local kept = { ["x-death"] = { death("q", "expired", 3), death("r", "rejected", 1) },
      ["x-first-death-queue"] = "r" }
    local moved = deaths.merge(kept, { ["x-death"] = { death("q", "expired", 2), death("s", "maxlen", 1) },
      ["x-first-death-queue"] = "s", ["x-last-death-queue"] = "q" }, 32)
    assert.same({
      ["x-death"] = { death("q", "expired", 5), death("s", "maxlen", 1), death("r", "rejected", 1) },
      ["x-first-death-queue"] = "r", ["x-last-death-queue"] = "q",
    }, moved)
    assert.same({ death("q", "expired", 5) }, deaths.merge(kept, {
      ["x-death"] = { death("q", "expired", 2) } }, 1)["x-death"])
    assert.is_nil((deaths.merge(kept, {}, 0)))
  end)

  it("may be anything that somebody published", function()
    for _, junk in ipairs { 5, "x", true, { 1, "two", {} }, { a = 1 } } do
      local _, any = deaths.merge(junk, { ["x-death"] = junk }, 32, "app")
      assert.is_true(any)
    end
  end)
end)

describe("a copy", function()
  local copy = require "moonrabbit.app.copy"
  local notes = { attempts = 1, error = ("x"):rep(2000), error_kind = "error", exchange = "e", routing_key = "k" }

  local function edits(msg_of, user, size)
    return copy.edits(msg_of, { notes = notes, ladder = "app" }, user, size or 1)
  end

  it("leaves behind what would end its trip, or the channel", function()
    local got = edits({
      headers = { CC = { "a" }, BCC = { "b" }, ["x-delivery-count"] = 3, ["x-death"] = { { queue = "q", count = 1 } },
        ["x-first-death-queue"] = "q", keep = 1 },
      properties = { expiration = "5", user_id = "theirs", reply_to = "amq.rabbitmq.reply-to", priority = 1 },
    }, "mine")
    table.sort(got.remove)
    table.sort(got.remove_properties)
    assert.same({ "BCC", "CC", "x-death", "x-delivery-count", "x-first-death-queue" }, got.remove)
    assert.same({ "expiration", "reply_to", "user_id" }, got.remove_properties)
    assert.same({ "a" }, got.set["moonrabbit-cc"])
    assert.same({ "b" }, got.set["moonrabbit-bcc"])
    assert.equal("5", got.set["moonrabbit-expiration"])
    assert.equal("theirs", got.set["moonrabbit-user-id"])
    assert.equal("amq.rabbitmq.reply-to", got.set["moonrabbit-reply-to"])
    assert.same({ { queue = "q", count = 1 } }, got.set["moonrabbit-deaths"]["x-death"])
    assert.equal(1024, #got.set["moonrabbit-error"])
  end)

  it("keeps its own user and a reply address that the broker made", function()
    local mine = { user_id = "mine", reply_to = "amq.rabbitmq.reply-to.g1h2" }
    local got = edits({ headers = {}, properties = mine }, "mine")
    assert.same({}, got.remove_properties)
    -- A user that the client does not know (a certificate's) may be another one.
    assert.same({ "user_id" }, edits({ headers = {}, properties = { user_id = "mine" } }).remove_properties)
  end)

  it("always says how often and where from", function()
    local got = edits({ headers = { ["moonrabbit-deaths"] = {} }, properties = {} }, nil, 3)
    assert.same({ ["moonrabbit-attempts"] = 1, ["moonrabbit-error-kind"] = "error", ["moonrabbit-exchange"] = "e",
      ["moonrabbit-key"] = "k" }, got.set)
    assert.same({ "moonrabbit-deaths" }, got.remove)
  end)

  it("says nothing at all where nothing fits, and still leaves behind what it must", function()
    local got = edits({ headers = { CC = { "a" }, ["x-death"] = { { queue = "q", count = 1 } },
      ["moonrabbit-deaths"] = {} }, properties = { expiration = "5" } }, nil, 4)
    table.sort(got.remove)
    assert.same({}, got.set)
    assert.same({ "CC", "moonrabbit-deaths", "x-death" }, got.remove)
    assert.same({ "expiration" }, got.remove_properties)
  end)

  it("of a dead letter that was moved back counts from the beginning", function()
    local all = { ["moonrabbit-attempts"] = 5, ["moonrabbit-first-failure"] = 1000 }
    assert.equal(5, copy.attempts { headers = all })
    assert.equal(1000, copy.first_failure { headers = all })
    all["moonrabbit-dead-at"] = 2000
    assert.equal(0, copy.attempts { headers = all })
    assert.is_nil(copy.first_failure { headers = all })
  end)

  it("believes no header that makes no sense", function()
    for _, junk in ipairs { -1, 1.5, "3", true, {}, 1e300, 0 / 0 } do
      assert.equal(0, copy.attempts { headers = { ["moonrabbit-attempts"] = junk } })
    end
    local from = { headers = { ["moonrabbit-exchange"] = {}, ["moonrabbit-key"] = "k" }, exchange = "e",
      routing_key = "r" }
    assert.same({ "e", "r" }, { copy.origin(from) })
    from.headers["moonrabbit-exchange"] = ""
    assert.same({ "", "k" }, { copy.origin(from) })
    local function key(exchange, kept)
      return copy.routing_key { exchange = exchange, routing_key = "q", headers = { ["moonrabbit-key"] = kept } }
    end
    assert.equal("k", key("app.home", "k"))
    assert.equal("k", key("", "k"))
    assert.equal("q", key("orders", "k"))
    assert.equal("q", key("app.home", nil))
    assert.equal("q", copy.routing_key { exchange = "", routing_key = "q" })
    assert.is_nil(copy.first_failure { headers = { ["moonrabbit-first-failure"] = "yesterday" } })
  end)
end)

describe("a check of the ladder", function()
  local ladder = require("moonrabbit.app.ladder").new "app"

  local function problems(queues, consumed)
    local list = {}
    for i, each in ipairs(ladder:check(queues, consumed)) do list[i] = each.problem .. " " .. each.queue end
    return list
  end

  it("finds nothing where all is well", function()
    assert.same({}, problems({
      { name = "app.wait.5s", type = "quorum", messages = 100, messages_dlx = 0, effective_policy_definition = {} },
      { name = "app.wait.1s", type = "quorum",
        effective_policy_definition = { ["queue-leader-locator"] = "balanced" } },
      { name = "app.orphans", type = "quorum", messages = 0 },
      { name = "q", arguments = { ["x-delivery-limit"] = 20 }, effective_policy_definition = {} },
      { name = "unlimited", arguments = { ["x-delivery-limit"] = -1 } },
      { name = "other.wait.5s", type = "classic", messages_dlx = 5 },
    }, { "q", "unlimited" }))
  end)

  it("finds what is stuck, changed, old, orphaned, impatient, or of a kind that cannot use it", function()
    assert.same({ "stuck app.wait.5s", "policy app.wait.1s", "classic app.wait.2s", "orphans app.orphans",
      "delivery_limit q", "delivery_limit r" }, problems({
      { name = "app.wait.5s", type = "quorum", messages_dlx = 3 },
      { name = "app.wait.1s", type = "quorum", policy = "all", effective_policy_definition = { ["message-ttl"] = 5 } },
      { name = "app.wait.2s", type = "classic" },
      { name = "app.orphans", type = "quorum", messages = 2 },
      { name = "q", arguments = { ["x-delivery-limit"] = 3 } },
      { name = "r", arguments = {}, effective_policy_definition = { ["delivery-limit"] = 9 } },
      { name = "unknown", arguments = { ["x-delivery-limit"] = 3 } },
    }, { "q", "r" }))
    assert.same({ "kind s", "kind e" }, problems({
      { name = "s", type = "stream", exclusive = false }, { name = "e", type = "classic", exclusive = true },
      { name = "other", type = "stream" },
    }, { "s", "e" }))
    local first = ladder:check({ { name = "app.wait.5s", messages_dlx = 3 } })[1]
    assert.equal(3, first.messages)
    assert.truthy(first.text:find("is a consumer's queue full?", 1, true))
  end)
end)
