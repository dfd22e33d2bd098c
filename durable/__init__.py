"""The durable log beside a node: streams, their groups of consumers, and recordings of topics.

A stream's part at one *sidecar* is a *partition*: a log of its own. Appends and questions go from a
node's handles over a *route* to a sidecar, in another process or in this one. Where things are::

    bytes and files
      storage            files and directories, and what a sync promises: the only one to touch them
      batch              the layout of a segment: its head, and batches of records
      records            what is inside a batch: payloads, and the columns beside them
      scan               reading a segment from its bytes: what is torn, what is damaged
      index              where to begin reading in a segment
      segment            one file of a log
      tip                how far a log may be read
      places             where in a log a time or a log epoch begins
      recovery           opening a log after whatever ended the last opening
      aside              torn tails that were cut off, kept to be looked at
      clock              the time of a log, which never goes back
      log                segments as one log: append, sync, roll, trim, mend
      cursor             reading a log on from an offset
      check              reading all of a log, to see that it is whole

    appends, at the sidecar
      partition          a log, and what tells a repeated append from a new one
      producers          how far each producer has come; its table is what a snapshot holds
      dedup_ids          ids that users gave to appends
      derivations        of which records others were made
      snapshot           the file of that table
      writer             the thread that writes a partition
      retention          which segments may go

    groups, at the sidecar
      group              the rules: who is given what, when it comes back, when it is settled
      waiting            … what may go to whom
      leases             … who has what, until when
      progress           … what must not be forgotten
      intervals          a set of offsets, as ranges
      journal            the file of a group's progress
      supply             what a group gets of the log
      batch_cache        batches that it may have to deliver again
      groups             all groups of a partition
      deliveries         what members ask, get and say
      members            the members of these groups, and whoever waits of them

    a sidecar
      protocol           the messages between streams and sidecars
      outcomes           what an append becomes, why something is refused, and as which error
      clerk              a thread that does one thing after the other
      rounds             which stream is looked after next
      hosted             one stream at a sidecar
      openings           streams that are being opened, and who waits for that
      folders            what is in its directory beside the logs
      sidecar            all streams of a directory
      hosting            a sidecar as part of a node

    streams, in the node that uses them
      finder             which sidecars there are
      route              the way to one of them
      streams            what all streams of a node share
      stream             the handle: `Node.stream`
      encoding           payloads to batches, in the caller's thread
      producing          which partition a handle appends to
      appender           what one producer has under way to one partition
      appending          waiting for that
      under_way          what is begun, and is finished when the node closes
      reading            records as users see them
      reader             reading one partition, over its route
      feeds              reading several at once
      replay             `Stream.replay`
      seat               a consumer's place in its group, at one partition
      held               what a consumer has there, and has said nothing of
      unsaid             … what it has done with it, and has not said yet
      consumed           a record, until its consumer has said what became of it
      consumer           `Stream.consumer`

    recordings of topics
      recording          `Node.record`: one recording, and its thread
      recording_account  what waits for the log, and what became of it
      recordings         all recordings of a node
      recording_finder   which other nodes record what, and where
      search             from where a log is read for messages that are missing
      repairer           filling the gaps of subscribers from recordings

    everywhere
      complaint          what is wrong for a while, and is logged once
"""
